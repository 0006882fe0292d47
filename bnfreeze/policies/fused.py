"""The policies ``fused`` and ``fused-act``: a layer becomes a `FrozenBatchNorm1d/2d/3d`, in place.

As with every policy, the layer stays the same object and its class is swapped. But here the new
class is not a subclass of the old one: its forward replaces the old one. So only layers are
converted whose forward is known to be batch norm and nothing else.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import Tensor, nn

from bnfreeze.nn.activations import activation_of
from bnfreeze.nn.modules import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from bnfreeze.norm_layers import forward_owner, has_known_forward
from bnfreeze.policies.class_swap import FrozenLayer, make_class
from bnfreeze.policies.eval import ForceEval
from bnfreeze.policies.record import layer_class, was_lookalike
from bnfreeze.torch_private import _BatchNorm


class _Fused1d(ForceEval, FrozenBatchNorm1d):
    replaces = FrozenBatchNorm1d


class _Fused2d(ForceEval, FrozenBatchNorm2d):
    replaces = FrozenBatchNorm2d


class _Fused3d(ForceEval, FrozenBatchNorm3d):
    replaces = FrozenBatchNorm3d


class _FusedSync(_Fused2d):
    # SyncBatchNorm takes an input of any rank.
    _ranks: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)


class _FusedLookalike(_Fused2d):
    """Adds what another library's frozen batch norm does not have."""

    eps = 1e-5  # what Transformers' compute with
    num_batches_tracked = None

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return self.running_mean.numel()

    @property
    def affine(self) -> bool:  # type: ignore[override]
        return self.weight is not None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # As theirs do: a checkpoint of a live layer has a count, which this layer does not keep.
        if "num_batches_tracked" not in self._buffers:
            state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _FusedAct(_Fused2d):
    """timm's BatchNormAct2d: a norm layer, a module that drops, and an activation."""

    act: nn.Module
    drop: nn.Module

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """As in `FrozenBatchNorm2d`; then the layer's own activation."""
        own = own_activation(self)
        if own is None:
            # One of the two has a hook, or was replaced since.
            return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]
        return super().forward(x, residual, own or activation)


def own_activation(layer: nn.Module) -> str | None:
    """The activation that a fused layer computes as its own: empty if it has none.

    None if it must call its own ``drop`` and ``act`` modules: they are not an identity and one of
    the four activations, or one of them has a hook.
    """
    if not isinstance(layer, _FusedAct):
        return ""
    act, drop = layer.act, layer.drop
    if type(drop) is not nn.Identity or has_hooks(act) or has_hooks(drop):
        return None
    return "" if type(act) is nn.Identity else activation_of(act)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook runs when the module is called, or a forward set on the instance.

    Accelerate puts its hooks on modules in that way.
    """
    return "forward" in module.__dict__ or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


_EXACT: dict[type[nn.Module], type[FrozenLayer]] = {
    nn.BatchNorm1d: _Fused1d,
    nn.BatchNorm2d: _Fused2d,
    nn.BatchNorm3d: _Fused3d,
    nn.SyncBatchNorm: _FusedSync,
    # Layers that the user built frozen. They compute the same already; now they can fuse more.
    FrozenBatchNorm1d: _Fused1d,
    FrozenBatchNorm2d: _Fused2d,
    FrozenBatchNorm3d: _Fused3d,
}
# The plain ones: FrozenBatchNorm2d and DetrFrozenBatchNorm2d, not timm's FrozenBatchNormAct2d.
_PLAIN_LOOKALIKE = re.compile(r"\w*FrozenBatchNorm2d", re.ASCII)
_LIBRARIES = ("torchvision", "detectron2", "timm", "transformers")


def fused_class(
    module: nn.Module, *, activations: bool = False
) -> tuple[type[nn.Module] | None, str]:
    """The class that makes a fused layer of `module`, or None and the reason why there is none.

    Args:
        module: a norm layer, frozen already or not.
        activations: whether layers with an activation of their own (timm's) may be converted.
    """
    base = layer_class(module)
    if "forward" in module.__dict__:
        return None, "its forward is overridden on the instance"
    if base in _EXACT and not has_known_forward(module, base):
        return None, f"the forward of {base.__name__} was replaced on the class"
    behaviour = _EXACT.get(base)
    owner = forward_owner(base)
    library = owner.__module__.partition(".")[0]
    if behaviour is None and was_lookalike(module):
        # Its forward is its library's, and nothing but batch norm.
        plain = library in _LIBRARIES and _PLAIN_LOOKALIKE.fullmatch(owner.__name__)
        behaviour = _FusedLookalike if plain else None
    if activations and (library, owner.__name__) == ("timm", "BatchNormAct2d"):
        act, drop = type(module.act), type(module.drop)
        if drop is not nn.Identity:
            return None, f"it drops ({drop.__name__}) before its activation"
        if act is not nn.Identity and activation_of(module.act) is None:
            return None, f"its activation {act.__name__} cannot be fused"
        behaviour = _FusedAct
    if behaviour is not None:
        return make_class(base, behaviour), ""
    if issubclass(base, _BatchNorm) or was_lookalike(module):
        return None, f"{base.__name__} has a forward of its own, which is kept"
    return None, f"there is no fused layer for {base.__name__}"
