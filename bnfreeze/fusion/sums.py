"""A frozen norm layer and the add that follows it, as one call of a generated forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnfreeze.nn import functional
from bnfreeze.nn.activations import ACTIVATIONS
from bnfreeze.nn.eager import PLAIN

# Modules that drop at random in train mode and return their input in eval mode, by the names of
# class and library, which need not be installed.
_DROPS = frozenset(
    {"Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "StochasticDepth", "DropPath"}
)
_LIBRARIES = ("torch", "torchvision", "timm")


def is_drop(module: nn.Module) -> bool:
    """Whether the module drops at random in train mode, and does nothing in eval mode."""
    kind = type(module)
    return kind.__name__ in _DROPS and kind.__module__.partition(".")[0] in _LIBRARIES


def norm_add(
    layer: Any,
    x: Tensor,
    residual: Tensor,
    activation: str | None,
    in_place: bool,
    swapped: bool,
    branch: Any = None,
) -> Tensor:
    """Compute ``activation(layer(x) + branch(residual))``, in one kernel where that pays.

    On a CPU in half precision it does not: a fused add needs an fp32 copy of everything. There the
    steps and the result are those of the policy ``fused``.

    Args:
        layer: a frozen norm layer.
        x: its input.
        residual: what is added.
        activation: its name, or None.
        in_place: whether the sum was written over its left side, and so has its dtype.
        swapped: whether the residual is on the left.
        branch: the norm layer that `residual` goes through first, or None.
    """
    if (
        # A subclass may add in another way.
        type(residual) in PLAIN
        and type(x) in PLAIN
        # Neither broadcast nor promoted; with other strides the left side decides on the sum's.
        and residual.shape == x.shape
        and residual.stride() == x.stride()
        and residual.dtype is x.dtype
        and residual.device == x.device
        and not (x.is_cpu and x.dtype.itemsize == 2)
    ):
        if branch is None:
            return layer(x, residual, activation)  # type: ignore[no-any-return]
        ranks = x.dim() in layer._ranks and x.dim() in branch._ranks
        if ranks and branch.running_mean.shape == layer.running_mean.shape:
            return functional._apply(x, layer._norm(), residual, branch._norm(), activation)
        # The layers say what does not fit.
    out = layer(x)
    other = residual if branch is None else branch(residual)
    if in_place:
        out += other
    else:
        out = other + out if swapped else out + other
    if activation == "relu" and type(out) is Tensor:
        return torch.relu_(out)  # nobody else has it
    return ACTIVATIONS[activation](out)
