"""Frozen batch norm in plain ATen: the formula, and the backward that saves next to nothing.

Everything here is ordinary differentiable tensor code. It is what tracing, export and the
functorch transforms see, what runs where there is no kernel, and what the kernel is tested
against.

The formula, per channel ``c``, is that of Ioffe and Szegedy 2015 (arXiv:1502.03167, algorithm 2)
with an addition and an activation behind it::

    z = (x - mean[c]) * weight[c] / sqrt(var[c] + eps) + bias[c] + residual
    y = activation(z)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

__all__ = ["ACTIVATIONS", "FROM_OUTPUT", "Affine", "backward", "forward", "scaled"]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}

# What the backward of an activation needs: its output, or (silu, hardswish) what went into it.
FROM_OUTPUT = frozenset({"relu", "relu6"})

# Rounding commutes with these, so that rounding before them is rounding once.
_EXACT = frozenset({None, "relu", "relu6"})

_HALVES = frozenset({torch.float16, torch.bfloat16})

# Where F.batch_norm takes a half input together with fp32 statistics, and computes in fp32.
_MIXES = frozenset({"cpu", "cuda"})


class Affine(NamedTuple):
    """The tensors and the eps of one frozen norm layer; each tensor has the shape (C,)."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def scale(self, dtype: torch.dtype) -> Tensor:
        """``weight / sqrt(var + eps)`` in ``dtype``, of shape (C,)."""
        scale = (self.var.to(dtype) + self.eps).rsqrt()
        return scale if self.weight is None else scale * self.weight.to(dtype)


def forward(
    x: Tensor,
    norm: Affine,
    residual: Tensor | None,
    branch: Affine | None,
    activation: str | None,
    *,
    keep_sum: bool = False,
    mixed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the output and, with ``keep_sum``, what goes into the activation.

    Args:
        x: (N, C, *) of a floating dtype.
        norm: applied to ``x``.
        residual: of the shape of ``x``, added after the norm.
        branch: applied to ``residual`` first.
        activation: a key of `ACTIVATIONS`.
        keep_sum: wanted where there is a residual and the backward needs its sum.
        mixed: let F.batch_norm read a half input as it is. One pass less; but only eager mode
            on some devices knows how.

    Both results have the dtype of ``x``, and are rounded once from fp32 (fp64 for fp64).
    """
    math = _math_dtype(x.dtype)
    if mixed and residual is None and activation in _EXACT and x.device.type in _MIXES:
        return ACTIVATIONS[activation](_normalise(x, norm, math)), None
    z = _normalise(x.to(math), norm, math)
    if residual is None:
        return ACTIVATIONS[activation](z).to(x.dtype), None
    other = residual.to(math)
    z = z + (other if branch is None else _normalise(other, branch, math))
    return ACTIVATIONS[activation](z).to(x.dtype), z.to(x.dtype) if keep_sum else None


def backward(
    grad: Tensor,
    norm: Affine,
    branch: Affine | None,
    activation: str | None,
    kept: Tensor | None,
    kept_is_input: bool,
    x: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    *,
    mixed: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, residual, weight and bias; None where ``needs`` says so.

    Args:
        grad: the gradient of the output, in its shape and dtype.
        norm: as in `forward`.
        branch: as in `forward`.
        activation: as in `forward`.
        kept: relu and relu6: the output. silu and hardswish: what went into the activation, or
            the input ``x``, from which that is computed again (``kept_is_input``).
        kept_is_input: which of the two ``kept`` is.
        x: the input; only the gradient of weight needs it.
        needs: which of the four are wanted.
        mixed: as in `forward`.

    In ordinary differentiable operations, so that a double backward may go through it.
    """
    dtype, math = grad.dtype, _math_dtype(grad.dtype)
    if activation is not None:
        assert kept is not None
        if activation in FROM_OUTPUT:
            grad = _GRADIENT[activation](grad, kept)
        else:
            z = kept.to(math)
            z = _normalise(z, norm, math) if kept_is_input else z
            grad = _GRADIENT[activation](grad.to(math), z)
    grad_x = scaled(grad, norm, mixed=mixed).to(dtype) if needs[0] else None
    grad_residual = None
    if needs[1]:
        grad_residual = (grad if branch is None else scaled(grad, branch, mixed=mixed)).to(dtype)
    grad_weight = grad_bias = None
    if needs[2] and norm.weight is not None:
        assert x is not None
        # Never sum(g·x) - mean·sum(g): the difference of two large numbers.
        centred = x.to(math) - _over(norm.mean.to(math), x)
        invstd = (norm.var.to(math) + norm.eps).rsqrt()
        grad_weight = ((grad.to(math) * centred).sum(_others(x)) * invstd).to(norm.weight.dtype)
    if needs[3] and norm.bias is not None:
        grad_bias = grad.to(math).sum(_others(grad)).to(norm.bias.dtype)
    return grad_x, grad_residual, grad_weight, grad_bias


def scaled(grad: Tensor, norm: Affine, *, mixed: bool = False) -> Tensor:
    """Return ``grad`` times the scale of each channel, in its dtype.

    It is the gradient of x where nothing follows the norm. Computed in fp32 where ``grad`` is a
    half; ``mixed`` as in `forward`.
    """
    math = _math_dtype(grad.dtype)
    if mixed and grad.dtype in _HALVES and grad.device.type in _MIXES:
        # A norm layer without mean and bias is just that product, in one pass without an fp32
        # copy: three times as fast on CPU as type promotion.
        linear = norm._replace(mean=torch.zeros_like(norm.mean), bias=None)
        return _normalise(grad, linear, math)
    return (grad * _over(norm.scale(math), grad)).to(grad.dtype)


def _silu_gradient(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, z)  # type: ignore[no-any-return]
    # ATen's has no derivative.
    sigmoid = z.sigmoid()
    return grad * sigmoid * (1 + z * (1 - sigmoid))


_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "relu6": lambda grad, y: torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0),
    "silu": _silu_gradient,
    "hardswish": lambda grad, z: torch.ops.aten.hardswish_backward(grad, z),
}


def _math_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _normalise(x: Tensor, norm: Affine, math: torch.dtype) -> Tensor:
    weight = None if norm.weight is None else norm.weight.to(math)
    bias = None if norm.bias is None else norm.bias.to(math)
    mean, var = norm.mean.to(math), norm.var.to(math)
    # Not F.batch_norm, which in some versions of torch refuses an eps of 0 in evaluation too.
    enabled = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, norm.eps, enabled)


def _over(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.view(-1, *[1] * (x.dim() - 2))


def _others(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
