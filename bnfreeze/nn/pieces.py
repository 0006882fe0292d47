"""`bnfreeze.nn.reference` for plain tensors, in pieces that stay in a CPU's cache where that is faster.

A half that is computed in fp32 needs memory of twice its own size on the way, several times over.
For a large feature map a CPU takes longer to find that memory than for all the arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnfreeze.nn import reference
from bnfreeze.nn.cuda.layouts import is_dense
from bnfreeze.nn.reference import EXACT, FROM_OUTPUT, Norm

__all__ = ["SIZE", "backward", "forward"]

# Elements: 4 MB in fp32, and enough for 32 threads where each takes 32768, torch's usual grain.
SIZE = 1 << 20

# Where a piece lies, and its channels.
Piece = tuple[tuple[slice, ...], slice]


def forward(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    branch: Norm | None,
    activation: str | None,
    *,
    keep_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `reference.forward` with ``eager``; arguments and results are the same."""
    if residual is None and activation in EXACT:
        return reference.normalised(x, norm, activation), None
    cut = _pieces(x, norm, branch)
    if not cut:
        return reference.forward(
            x, norm, residual, branch, activation, keep_sum=keep_sum, eager=True
        )
    y, total = torch.empty_like(x), torch.empty_like(x) if keep_sum else None
    for where, channels in cut:
        other = None if residual is None else residual[where]
        theirs = None if branch is None else _of(branch, channels)
        part = x[where], _of(norm, channels), other, theirs, activation
        into = y[where], None if total is None else total[where]
        reference.forward(*part, keep_sum=keep_sum, eager=True, into=into)
    return y, total


def backward(
    grad: Tensor,
    norm: Norm,
    branch: Norm | None,
    activation: str | None,
    kept: Tensor | None,
    kept_is_input: bool,
    x: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute `reference.backward` with ``eager``; arguments and results are the same."""
    direct = kept is None or activation in FROM_OUTPUT
    # The sums for the gradients of weight and bias are not taken apart.
    cut = [] if direct or needs[2] or needs[3] else _pieces(grad, norm, branch)
    if not cut:
        return reference.backward(
            grad, norm, branch, activation, kept, kept_is_input, x, needs, eager=True
        )
    assert kept is not None
    grads = [torch.empty_like(grad) if need else None for need in needs]
    for where, channels in cut:
        theirs = None if branch is None else _of(branch, channels)
        part = grad[where], _of(norm, channels), theirs, activation, kept[where]
        done = reference.backward(*part, kept_is_input, None, needs, eager=True)
        for whole, one in zip(grads, done, strict=True):
            if whole is not None and one is not None:
                whole[where] = one
    return grads[0], grads[1], None, None


def _pieces(x: Tensor, *norms: Norm | None) -> list[Piece]:
    """Return slices that together are all of ``x`` (N, C, *), each in one stretch of memory.

    None of them where nothing is won: ``x`` is small, no half, not on a CPU or in no usual layout.
    Nor where a norm has not C of everything, which a slice would hide from ATen's own complaint.
    """
    if x.numel() <= SIZE or x.dtype.itemsize > 2 or not x.is_cpu or not is_dense(x):
        return []
    tensors = [each for norm in norms if norm is not None for each in norm[:4]]
    if any(each is not None and each.numel() != x.size(1) for each in tensors):
        return []
    images, channels, *size = x.shape
    every = slice(None)
    one = x.numel() // images
    if one <= SIZE:
        return [((each,), every) for each in _parts(images, one)]
    alone = [slice(n, n + 1) for n in range(images)]
    if x.is_contiguous():
        # ATen gives each thread whole planes.
        steps = _parts(channels, one // channels, torch.get_num_threads())
        return [((n, c), c) for n in alone for c in steps]
    return [((n, every, h), every) for n in alone for h in _parts(size[0], one // size[0])]


def _parts(length: int, each: int, least: int = 1) -> list[slice]:
    """Cut a dimension, of which every index has ``each`` elements, into parts of about a size."""
    step = max(math.ceil(length / math.ceil(length * each / SIZE)), least)
    return [slice(begin, begin + step) for begin in range(0, length, step)]


def _of(norm: Norm, channels: slice) -> Norm:
    """The norm of some of the channels."""
    mean, var, weight, bias, eps = norm
    weight, bias = (None if each is None else each[channels] for each in (weight, bias))
    return mean[channels], var[channels], weight, bias, eps
