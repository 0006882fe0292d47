"""Frozen batch norm in plain ATen: the formula, and a backward that saves next to nothing.

Everything here is ordinary differentiable tensor code. Tracing, export and the torch.func
transforms see it; it runs where the kernel cannot; and the kernel is tested against it.

The formula, for each channel ``c``, is that of Ioffe and Szegedy 2015 (arXiv:1502.03167,
algorithm 2), followed by an addition and an activation::

    z = (x - mean[c]) * weight[c] / sqrt(var[c] + eps) + bias[c] + residual
    y = activation(z)
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from bnfreeze.nn.activations import ACTIVATIONS, EXACT, FROM_OUTPUT, GRADIENTS

# Up to this many elements, the time of an operation is the time of calling it.
_TINY = 2**11

_zeros = lru_cache(partial(torch.zeros, device="cpu", dtype=torch.float32))

# Mean, var, weight, bias and eps of one frozen norm layer; each tensor has the shape (C,). A plain
# tuple, because making a named one takes a twentieth of a call's time on the host.
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
) -> tuple[Tensor, Tensor | None]:
    """Return the output and, with ``keep_sum``, what goes into the activation.

    Args:
        x: (N, C, *) of a floating dtype.
        norm: applied to ``x``.
        residual: of the shape of ``x``, added after the norm.
        branch: applied to ``residual`` first.
        activation: a key of `bnfreeze.nn.activations.ACTIVATIONS`.
        keep_sum: whether the backward needs the sum of the norm and the residual.
        eager: whether the tensors are plain and nothing observes the operations. Then
            intermediate results are changed in place.

    Both results have the dtype of ``x``, and are rounded once from fp32 (fp64 for fp64).
    """
    math = _math_dtype(x.dtype)
    # batch_norm reads a half and rounds the result, without a copy in fp32. That is enough where
    # nothing follows, or an activation that gives the same if its input is rounded first.
    if eager and residual is None and activation in EXACT and _takes_halves(x):
        z = _normalise(x, norm, math)
        return z if activation is None else ACTIVATIONS[activation](z, inplace=True), None
    z = _normalise(_cast(x, math), norm, math)
    if residual is not None:
        other = _cast(residual, math)
        other = other if branch is None else _normalise(other, branch, math)
        z = z.add_(other) if eager else z + other
    total = _cast(z, x.dtype) if keep_sum else None
    y = ACTIVATIONS[activation](z, inplace=eager and z is not total)
    return _cast(y, x.dtype), total


def backward(
    grad: Tensor,
    norm: Norm,
    branch: Norm | None,
    activation: str | None,
    kept: Tensor | None,
    alone: bool,
    x: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    *,
    grad_sum: Tensor | None = None,
    eager: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, residual, weight and bias; None where ``needs`` says so.

    Args:
        grad: the gradient of the output, in its shape and dtype.
        norm: as in `forward`.
        branch: as in `forward`.
        activation: as in `forward`.
        kept: what the backward of the activation needs. It is the output for an activation in
            `FROM_OUTPUT`. For the others it is the sum or, without a residual, ``x``, from which
            the input of the activation is computed again.
        alone: whether there is no residual.
        x: the input; only the gradient of weight needs it.
        needs: which of the four gradients are wanted.
        grad_sum: the gradient of the sum that `forward` returned, if it has one of its own.
        eager: as in `forward`.

    All operations are differentiable, so that double backward works.
    """
    dtype, math = grad.dtype, _math_dtype(grad.dtype)
    if activation is not None:
        assert kept is not None
        if activation in FROM_OUTPUT:
            grad = GRADIENTS[activation](grad, kept)
        else:
            z = kept.to(math)
            grad = GRADIENTS[activation](grad.to(math), _normalise(z, norm, math) if alone else z)
    if grad_sum is not None:
        grad = grad + grad_sum
    grad_residual = None
    if needs[1]:
        grad_residual = _cast(grad if branch is None else scaled(grad, branch, eager), dtype)
    grad_weight = grad_bias = None
    mean, var, weight, bias, eps = norm
    if needs[2] and weight is not None:
        assert x is not None
        # Not sum(g·x) - mean·sum(g), which would be the difference of two large numbers.
        centred = x.to(math) - _over(mean.to(math), x)
        invstd = (var.to(math) + eps).rsqrt()
        grad_weight = ((grad.to(math) * centred).sum(_others(x)) * invstd).to(weight.dtype)
    if needs[3] and bias is not None:
        grad_bias = grad.to(math).sum(_others(grad)).to(bias.dtype)
    grad_x = None
    if needs[0]:
        # After an activation `grad` is a new tensor, which may be changed in place unless it is
        # the residual's gradient too.
        own = eager and activation is not None and grad_residual is not grad
        grad_x = _cast(scaled(grad, norm, eager, in_place=own), dtype)
    return grad_x, grad_residual, grad_weight, grad_bias


def scaled(grad: Tensor, norm: Norm, eager: bool, in_place: bool = False) -> Tensor:
    """Return ``grad`` times the scale of each channel, in its dtype. A half is computed in fp32."""
    _, var, weight, _, eps = norm
    math = _math_dtype(grad.dtype)
    half, tiny = grad.dtype is not math, math is torch.float32 and grad.numel() <= _TINY
    if eager and (half or tiny) and _takes_halves(grad):
        # A norm layer with zero mean and no bias computes this product. For halves that is one
        # pass without an fp32 copy, three times as fast on a CPU as type promotion. For a tiny
        # tensor it is one operation where the formula takes five. For a large fp32 tensor it can
        # take twice as long.
        # Cached on the CPU only: memory made while a CUDA graph is captured belongs to the graph.
        zeros = _zeros(var.numel()) if var.is_cpu else torch.zeros_like(var)
        return _normalise(grad, (zeros, var, weight, None, eps), math)
    scale = (_cast(var, math) + eps).rsqrt()
    scale = _over(scale if weight is None else scale * _cast(weight, math), grad)
    return grad.mul_(scale) if in_place and not half else _cast(grad * scale, grad.dtype)


def _math_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # to() takes a microsecond to find out that there is nothing to do.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _takes_halves(x: Tensor) -> bool:
    """Whether batch_norm on this device takes a half input with fp32 statistics."""
    return x.is_cpu or x.is_cuda


def _normalise(x: Tensor, norm: Norm, math: torch.dtype) -> Tensor:
    mean, var, weight, bias, eps = norm
    mean, var = _cast(mean, math), _cast(var, math)
    weight = None if weight is None else _cast(weight, math)
    bias = None if bias is None else _cast(bias, math)
    # Not F.batch_norm: some versions of torch refuse an eps of 0 there, in evaluation too.
    enabled = x.is_cuda and torch.backends.cudnn.enabled  # asking takes a tenth of the call
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, enabled)


def _over(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.view(-1, *[1] * (x.dim() - 2))


def _others(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
