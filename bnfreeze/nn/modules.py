"""The frozen layers: drop-ins for nn.BatchNorm1d, 2d and 3d that never leave evaluation.

All methods use only attributes that torch's own norm layers have too. So `freeze` can replace the
``__class__`` of a live `nn.BatchNorm2d` by a subclass of `FrozenBatchNorm2d`, and it works. Weight
and bias stay Parameters there. In a layer that is built directly they are buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, TypeVar, cast

import torch
import torch.fx
from torch import Tensor, nn

from bnfreeze.errors import PolicyError
from bnfreeze.nn.functional import _apply
from bnfreeze.nn.reference import Norm
from bnfreeze.norm_layers import AFFINE, STATISTICS
from bnfreeze.torch_private import _BatchNorm

# For torch.fx.symbolic_trace, which has no sizes, the layer is one call.
torch.fx.wrap("_apply")
_Proxy = torch.fx.Proxy
_Self = TypeVar("_Self", bound="_FrozenBatchNormNd")


class _FrozenBatchNormNd(nn.Module):
    """What the three have in common. They differ in the ranks that they accept."""

    # As in torch's norm layers, so that their checkpoints and ours have one format.
    _version = 2

    _ranks: ClassVar[tuple[int, ...]]
    _freezes: ClassVar[type[_BatchNorm]]

    num_features: int
    eps: float
    affine: bool
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        dtype = dtype or torch.get_default_dtype()
        wide = torch.promote_types(dtype, torch.float32)
        weight = torch.ones(num_features, device=device, dtype=dtype) if affine else None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if weight is None else torch.zeros_like(weight))
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=wide))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=wide))
        self.register_buffer(
            "num_batches_tracked", torch.zeros((), device=device, dtype=torch.long)
        )

    @classmethod
    def from_batchnorm(cls: type[_Self], bn: nn.Module) -> _Self:
        """Make a frozen layer with copies of the values of ``bn``, on its device.

        Weight and bias of the new layer are buffers. They keep their dtype; statistics below fp32
        become fp32.

        Args:
            bn: torch's norm layer of the same rank, a SyncBatchNorm, or another library's frozen
                layer. It must have running_mean, running_var and eps.

        Raises:
            PolicyError: ``bn`` has no running statistics, is of another rank, or does more in
                its forward than normalise.
        """
        mean, var = getattr(bn, "running_mean", None), getattr(bn, "running_var", None)
        kind = type(bn).__name__
        if mean is None or var is None:
            raise PolicyError(
                f"{kind} has no running statistics, so there is nothing to freeze. A layer "
                f"made with track_running_stats=False always normalises with the batch."
            )
        if isinstance(bn, _BatchNorm):
            if not isinstance(bn, (cls._freezes, nn.SyncBatchNorm)):
                raise PolicyError(
                    f"{kind} takes inputs of another rank than {cls.__name__}, "
                    f"which replaces {cls._freezes.__name__}."
                )
            if type(bn).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
                raise PolicyError(
                    f"{kind} has a forward of its own, which would be lost. "
                    f"Use freeze(model, 'eval+affine') for it."
                )
        weight = getattr(bn, "weight", None)
        eps = cast(float, bn.eps)
        layer = cls(mean.numel(), eps, weight is not None, mean.device, mean.dtype)
        with torch.no_grad():
            for name in AFFINE:
                value = getattr(bn, name, None)
                setattr(layer, name, None if value is None else value.detach().clone())
            for name in STATISTICS:
                value = getattr(bn, name, None)
                if value is not None:
                    getattr(layer, name).copy_(value)
        return layer

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """Normalise ``x`` with the running statistics; add ``residual``; apply ``activation``.

        Shapes, dtypes and errors as in `bnfreeze.functional.frozen_batch_norm`.

        Raises:
            ValueError: the rank or the number of channels is not this layer's.
        """
        if not isinstance(x, _Proxy) and x.dim() not in self._ranks:
            ranks = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(
                f"{type(self).__name__} takes a {ranks} input with {self.num_features} channels; "
                f"this one is {x.dim()}D, of the shape {tuple(x.shape)}."
            )
        return _apply(x, self._norm(), residual, None, activation)

    def _norm(self) -> Norm:
        # nn.Module's own lookup of the four takes as long as the launch of a kernel.
        buffers: Any = self._buffers
        affine: Any = self._parameters or buffers
        try:
            mean, var = buffers["running_mean"], buffers["running_var"]
            return mean, var, affine["weight"], affine["bias"], self.eps
        except KeyError:
            # Parametrized, or a replica of DataParallel: they are attributes.
            return self.running_mean, self.running_var, self.weight, self.bias, self.eps

    @property
    def training(self) -> bool:
        """Always False: `train` and setting it have no effect."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = False

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """As in nn.Module, but the statistics are not cast below fp32."""
        before = [(name, getattr(self, name)) for name in STATISTICS[:2]]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before:
            now = getattr(self, name)
            if kept is not None and now.dtype.itemsize < 4 <= kept.dtype.itemsize:
                setattr(self, name, kept.to(now.device, torch.float32))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        """As in nn.Module, but a checkpoint may lack num_batches_tracked."""
        key = prefix + "num_batches_tracked"
        count = self.num_batches_tracked
        if count is not None and key not in state_dict:
            # As in torch: a model that was built on the meta device has no count to keep.
            state_dict[key] = torch.zeros_like(count, device="cpu") if count.is_meta else count
        if local_metadata.get("assign_to_params_buffers"):
            for name in STATISTICS[:2]:
                value = state_dict.get(prefix + name)
                if isinstance(value, Tensor) and value.dtype.itemsize < 4:
                    state_dict[prefix + name] = value.float()
            for name in AFFINE:
                value = state_dict.get(prefix + name)
                if name in self._buffers and isinstance(value, Tensor):
                    # An assigned Parameter would take the place of the buffer, and train.
                    state_dict[prefix + name] = value.detach()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which calls this: it cannot compile `forward`.

        Raises:
            PolicyError: always; it says what to do instead.
        """
        raise PolicyError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script. Use torch.jit.trace or "
            f"torch.export.export, or freeze with 'eval+affine' instead of 'fused'."
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class FrozenBatchNorm1d(_FrozenBatchNormNd):
    """A frozen `nn.BatchNorm1d`: (N, C) or (N, C, L).

    Args:
        num_features: C.
        eps: added to the variance.
        affine: whether there are weight and bias. They are buffers, as torchvision's are, so
            that ``model.requires_grad_(True)`` does not thaw them. To train them, build the model
            with `nn.BatchNorm1d` and ``freeze(model, "eval")`` it.
        device: of the tensors.
        dtype: of weight and bias. The statistics are at least fp32, after ``half()`` too.

    It always normalises with the running statistics and never changes them; ``training`` is
    always False. The state_dict has the keys of torch's layer, and loads with and without
    ``num_batches_tracked``.
    """

    _ranks = (2, 3)
    _freezes = nn.BatchNorm1d


class FrozenBatchNorm2d(_FrozenBatchNormNd):
    """A frozen `nn.BatchNorm2d`: (N, C, H, W). Otherwise as `FrozenBatchNorm1d`."""

    _ranks: ClassVar[tuple[int, ...]] = (4,)
    _freezes = nn.BatchNorm2d


class FrozenBatchNorm3d(_FrozenBatchNormNd):
    """A frozen `nn.BatchNorm3d`: (N, C, D, H, W). Otherwise as `FrozenBatchNorm1d`."""

    _ranks = (5,)
    _freezes = nn.BatchNorm3d
