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
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

__all__ = [
    "ACTIVATIONS",
    "EXACT",
    "FROM_OUTPUT",
    "Norm",
    "backward",
    "forward",
    "normalised",
    "scaled",
]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
}

# What the backward of an activation needs: its output, or (silu, hardswish) what went into it.
FROM_OUTPUT = frozenset({"relu", "relu6"})

# Rounding commutes with these, so that rounding before them is rounding once.
EXACT = frozenset({None, "relu", "relu6"})


# Up to this many elements, whatever their shape, an operation costs what calling it costs.
_TINY = 2**11

# Mean, var, weight, bias and eps of one frozen norm layer; each tensor has the shape (C,). A plain
# tuple: to make a named one costs a twentieth of a call's time on the host.
Norm = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]


def forward(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    branch: Norm | None,
    activation: str | None,
    *,
    keep_sum: bool = False,
    eager: bool = False,
    into: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    """Return the output and, with ``keep_sum``, what goes into the activation.

    Args:
        x: (N, C, *) of a floating dtype.
        norm: applied to ``x``.
        residual: of the shape of ``x``, added after the norm.
        branch: applied to ``residual`` first.
        activation: a key of `ACTIVATIONS`.
        keep_sum: wanted where there is a residual and the backward needs its sum.
        eager: the tensors are plain and nobody looks on. Then what is made on the way is changed
            in place.
        into: where both results are written, in place of new tensors.

    Both results have the dtype of ``x``, and are rounded once from fp32 (fp64 for fp64).
    """
    math = _math_dtype(x.dtype)
    wide = _cast(x, math)
    z = _normalise(wide, norm, math)
    if residual is not None:
        # New memory costs a CPU as much as a pass over it; the copy of x is not needed any more.
        # From another device it would take what the sum is to refuse.
        reuse = eager and wide is not x and residual.device == x.device
        other = wide.copy_(residual) if reuse else _cast(residual, math)
        other = other if branch is None else _normalise(other, branch, math)
        z = z.add_(other) if eager else z + other
    total = _cast(z, x.dtype, into[1]) if keep_sum else None
    return _cast(_activated(z, activation, eager and z is not total), x.dtype, into[0]), total


def backward(
    grad: Tensor,
    norm: Norm,
    branch: Norm | None,
    activation: str | None,
    kept: Tensor | None,
    kept_is_input: bool,
    x: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    *,
    eager: bool = False,
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
        eager: as in `forward`.

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
    grad_residual = None
    if needs[1]:
        grad_residual = _cast(grad if branch is None else scaled(grad, branch, eager=eager), dtype)
    grad_weight = grad_bias = None
    mean, var, weight, bias, eps = norm
    if needs[2] and weight is not None:
        assert x is not None
        # Never sum(g·x) - mean·sum(g): the difference of two large numbers.
        centred = x.to(math) - _over(mean.to(math), x)
        invstd = (var.to(math) + eps).rsqrt()
        grad_weight = ((grad.to(math) * centred).sum(_others(x)) * invstd).to(weight.dtype)
    if needs[3] and bias is not None:
        grad_bias = grad.to(math).sum(_others(grad)).to(bias.dtype)
    grad_x = None
    if needs[0]:
        # Past an activation it is a tensor of our own, unless the residual gets the same one.
        own = activation is not None and grad_residual is not grad
        if eager and own and grad.dtype is math:
            grad_x = _cast(grad.mul_(_over(_scale(norm, math), grad)), dtype)
        else:
            grad_x = _cast(scaled(grad, norm, eager=eager), dtype)
    return grad_x, grad_residual, grad_weight, grad_bias


def normalised(x: Tensor, norm: Norm, activation: str | None = None) -> Tensor:
    """Return what `forward` does with ``eager`` where at most one of `EXACT` follows the norm.

    A half input is read as it is.
    """
    math = _math_dtype(x.dtype)
    if _mixes(x):
        z = _normalise(x, norm, math)
    else:
        z = _cast(_normalise(_cast(x, math), norm, math), x.dtype)
    return _activated(z, activation, True)


def scaled(grad: Tensor, norm: Norm, *, eager: bool = False) -> Tensor:
    """Return ``grad`` times the scale of each channel, in its dtype.

    It is the gradient of x where nothing follows the norm. Computed in fp32 where ``grad`` is a
    half; ``eager`` as in `forward`.
    """
    math = _math_dtype(grad.dtype)
    half, tiny = grad.dtype is not math, math is torch.float32 and grad.numel() <= _TINY
    if eager and (half or tiny) and _mixes(grad):
        # A norm layer without mean and bias is just that product. Of halves it is one pass without
        # an fp32 copy, three times as fast on CPU as type promotion; of next to nothing it is one
        # operation where the formula is five; but of more in fp32 it can take twice as long.
        _, var, weight, _, eps = norm
        # Kept on the CPU only: memory made while a CUDA graph is captured belongs to the graph.
        zeros = _zeros(var.numel()) if var.is_cpu else torch.zeros_like(var)
        return _normalise(grad, (zeros, var, weight, None, eps), math)
    return _cast(grad * _over(_scale(norm, math), grad), grad.dtype)


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


def _cast(tensor: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    if into is not None:
        return into.copy_(tensor)
    # to() takes a microsecond to find that there is nothing to do.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _mixes(x: Tensor) -> bool:
    """Whether F.batch_norm takes halves with fp32 statistics there, and computes in fp32."""
    return x.is_cpu or x.is_cuda


@lru_cache
def _zeros(channels: int) -> Tensor:
    return torch.zeros(channels, device="cpu", dtype=torch.float32)


def _scale(norm: Norm, dtype: torch.dtype) -> Tensor:
    """``weight / sqrt(var + eps)`` in ``dtype``, of shape (C,)."""
    _, var, weight, _, eps = norm
    scale = (_cast(var, dtype) + eps).rsqrt()
    return scale if weight is None else scale * _cast(weight, dtype)


def _normalise(x: Tensor, norm: Norm, math: torch.dtype) -> Tensor:
    mean, var, weight, bias, eps = norm
    mean, var = _cast(mean, math), _cast(var, math)
    weight = None if weight is None else _cast(weight, math)
    bias = None if bias is None else _cast(bias, math)
    # Not F.batch_norm, which in some versions of torch refuses an eps of 0 in evaluation too.
    enabled = x.is_cuda and torch.backends.cudnn.enabled  # to ask costs a tenth of the call
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, enabled)


def _activated(z: Tensor, activation: str | None, in_place: bool) -> Tensor:
    if activation is None or not in_place:
        return ACTIVATIONS[activation](z)
    return _IN_PLACE[activation](z)


def _over(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.view(-1, *[1] * (x.dim() - 2))


def _others(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
