"""A frozen norm layer and the sum that follows it, as one call of a generated forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bnfreeze.nn.eager import PLAIN
from bnfreeze.nn.functional import _frozen_batch_norm_add
from bnfreeze.nn.reference import ACTIVATIONS

__all__ = ["is_drop", "norm_add"]

# Modules that drop at random, by class name (their libraries need not be there), and what holds
# their probability. In eval mode, or where that is 0, they give back what they are given.
_DROPS = {
    "Dropout": "p",
    "Dropout1d": "p",
    "Dropout2d": "p",
    "Dropout3d": "p",
    "StochasticDepth": "p",
    "DropPath": "drop_prob",
}
_LIBRARIES = ("torch", "torchvision", "timm")


def is_drop(module: nn.Module) -> bool:
    """Whether the module drops at random, and otherwise does nothing."""
    kind = type(module)
    return kind.__name__ in _DROPS and kind.__module__.partition(".")[0] in _LIBRARIES


def norm_add(
    layer: Any,
    x: Tensor,
    residual: Tensor,
    activation: str | None,
    branch: Any,
    drop: Any,
    in_place: bool,
    swapped: bool,
) -> Tensor:
    """``activation(drop(layer(x)) + branch(residual))``, in one kernel where that is the same.

    Args:
        layer: a frozen norm layer.
        x: its input.
        residual: what is added.
        activation: its name, or None.
        branch: the norm layer that `residual` goes through first, or None.
        drop: a module for which `is_drop` holds, or None.
        in_place: whether the sum was written over its left side, and so has its dtype.
        swapped: whether the residual is on the left.
    """
    if (
        # A subclass may add in another way.
        type(residual) in PLAIN
        and type(x) in PLAIN
        # Neither broadcast nor promoted.
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device
        and (drop is None or not (drop.training and getattr(drop, _DROPS[type(drop).__name__])))
    ):
        if branch is None:
            return layer(x, residual, activation)  # type: ignore[no-any-return]
        ranks = x.dim() in layer._ranks and x.dim() in branch._ranks
        if ranks and branch.running_mean.shape == layer.running_mean.shape:
            return _frozen_batch_norm_add(x, layer._norm(), residual, branch._norm(), activation)
        # What does not fit is told by the layers.
    out = layer(x)
    if drop is not None:
        out = drop(out)
    other = residual if branch is None else branch(residual)
    if in_place:
        out += other
    else:
        out = other + out if swapped else out + other
    return ACTIVATIONS[activation](out)
