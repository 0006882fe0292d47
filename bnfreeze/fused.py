"""The policy ``fused``: a norm layer becomes a `FrozenBatchNorm1d/2d/3d`, in place.

As with every policy the layer stays the very object it was, and its class is swapped; only that the
new class is no subclass of the old one: its forward takes the old one's place. So only layers whose
forward is known to be nothing but batch norm are converted.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfreeze.held import ForceEval, Held, make_class
from bnfreeze.layers import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from bnfreeze.norms import is_lookalike
from bnfreeze.record import layer_class

__all__ = ["fused_class"]


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
    """Fills in what another library's frozen batch norm does not have."""

    eps = 1e-5  # what Transformers' compute with
    num_batches_tracked = None

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return self.running_mean.numel()

    @property
    def affine(self) -> bool:  # type: ignore[override]
        return self.weight is not None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # As theirs: a checkpoint of a live layer has a count, and this layer no place for it.
        if "num_batches_tracked" not in self._buffers:
            state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


_EXACT: dict[type[nn.Module], type[Held]] = {
    nn.BatchNorm1d: _Fused1d,
    nn.BatchNorm2d: _Fused2d,
    nn.BatchNorm3d: _Fused3d,
    nn.SyncBatchNorm: _FusedSync,
}
# The plain ones: FrozenBatchNorm2d and DetrFrozenBatchNorm2d, not timm's FrozenBatchNormAct2d.
_PLAIN_LOOKALIKE = re.compile(r"\w*FrozenBatchNorm2d", re.ASCII)
_LIBRARIES = ("torchvision", "detectron2", "timm", "transformers")


def fused_class(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The class that makes a fused layer of `module`, or None and the reason why there is none."""
    base = layer_class(module)
    if "forward" in module.__dict__:
        return None, "its forward is overridden on the instance"
    behaviour = _EXACT.get(base)
    if is_lookalike(module, base):
        behaviour = _FusedLookalike if _is_plain(base) else None
    if behaviour is not None:
        return make_class(base, behaviour), ""
    if issubclass(base, _BatchNorm) or is_lookalike(module, base):
        return None, f"{base.__name__} is a class of its own, whose forward is kept"
    return None, f"there is no fused layer for {base.__name__}"


def _is_plain(base: type[nn.Module]) -> bool:
    """Whether a look-alike's forward is its library's, and nothing but batch norm."""
    if issubclass(base, FrozenBatchNorm1d | FrozenBatchNorm2d | FrozenBatchNorm3d):
        return False  # it is fused already
    owner = next(kind for kind in base.__mro__ if "forward" in vars(kind))
    return (
        owner.__module__.split(".")[0] in _LIBRARIES
        and _PLAIN_LOOKALIKE.fullmatch(owner.__name__) is not None
    )
