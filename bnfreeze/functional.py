"""Frozen batch norm as a function, with the residual and the activation that follow it.

One question is asked of every call: may it take the fused CUDA kernel, may it at least take ATen
with a backward of our own that saves next to nothing, or must it be plain differentiable ATen?
`backend` answers it in words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack as _function_modes
from torch.utils._device import DeviceContext

from bnfreeze import aten
from bnfreeze.aten import ACTIVATIONS, FROM_OUTPUT, Affine

__all__ = ["Backend", "backend", "frozen_batch_norm"]


def frozen_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalise with the running statistics; add ``residual``; apply ``activation``.

    ``activation((x - running_mean) * weight / sqrt(running_var + eps) + bias + residual)``,
    per channel (Ioffe and Szegedy 2015, algorithm 2), in one kernel where there is one.

    Args:
        x: (N, C, *) of any floating dtype; channels_last or not.
        running_mean: (C,), not differentiated. Read, never written.
        running_var: (C,), likewise.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the variance.
        residual: of the shape of ``x``, or None. It is not broadcast.
        activation: ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"`` or None.

    Returns:
        A new tensor of the shape and dtype of ``x``. The arithmetic is in fp32 (in fp64 for
        fp64) and rounds once, whatever the dtypes, under autocast too.

    With weight and bias not requiring grad, nothing of the size of ``x`` is saved for backward
    without an activation; with relu or relu6 the output is; with silu or hardswish one tensor.

    Raises:
        ValueError: ``x`` has no channel dimension or a number of channels that is not C;
            ``residual`` has another shape; ``activation`` is unknown.
        TypeError: ``x`` is not of a floating dtype.
    """
    norm = Affine(running_mean, running_var, weight, bias, eps)
    return _apply(x, norm, residual, None, activation)


def _frozen_batch_norm_add(
    x: Tensor, norm: Affine, residual: Tensor, branch: Affine, activation: str | None = None
) -> Tensor:
    """``activation(norm(x) + branch(residual))``: two frozen norm layers that meet in one sum.

    The entry point for a fused residual block whose downsample branch ends in a norm layer of
    its own. As `frozen_batch_norm`; ``residual`` (of the shape of ``x``) is first normalised
    with ``branch``. Not public: the fusing of `freeze` is its one user.
    """
    return _apply(x, norm, residual, branch, activation)


@dataclass(frozen=True)
class Backend:
    """Which path an input takes, and why.

    ``path`` is ``"kernel"`` (the fused CUDA kernel), ``"aten"`` (ATen, with a backward that saves
    next to nothing) or ``"formula"`` (plain differentiable ATen). ``why`` is a sentence.
    """

    path: Literal["kernel", "aten", "formula"]
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def backend(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
) -> Backend:
    """Tell which path `frozen_batch_norm` takes for these tensors, here and now, and why.

    Args as in `frozen_batch_norm`; those left out are taken to be ordinary fp32 tensors on the
    device of ``x``. On a CUDA device this loads what the kernel needs, as the first call would,
    so that a kernel which cannot be had is not promised.
    """
    if running_mean is None:
        running_mean = torch.empty(x.shape[1], device=x.device)
    if running_var is None:
        running_var = running_mean
    norm = Affine(running_mean, running_var, weight, bias, 1e-5)
    why = _why_formula(x, norm, residual, None)
    if why:
        return Backend("formula", why)
    engine, why = _engine(x, norm, residual, None)
    return Backend(engine.path, why)


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Engine:
    """What computes on plain eager tensors; both functions are called as those of `aten`."""

    path: Literal["kernel", "aten"]
    forward: Callable[..., tuple[Tensor, Tensor | None]]
    backward: Callable[..., Grads]


_ATEN = _Engine("aten", partial(aten.forward, mixed=True), partial(aten.backward, mixed=True))


class _FrozenBatchNorm(torch.autograd.Function):
    """Saves the least: what each activation needs, and ``x`` only for the gradient of weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Affine,
        branch: Affine | None,
        activation: str | None,
        engine: _Engine,
    ) -> Any:
        # With a residual the sum cannot be had from x alone; it becomes a second output, so that
        # a double backward finds its way through it.
        keeps_sum = residual is not None and activation in ("silu", "hardswish")
        y, total = engine.forward(x, norm, residual, branch, activation, keep_sum=keeps_sum)
        kept = None
        if activation is not None:
            kept = y if activation in FROM_OUTPUT else total if keeps_sum else x
        ctx.save_for_backward(
            kept,
            x if ctx.needs_input_grad[2] else None,
            *norm[:4],
            *(branch[:4] if branch is not None else ()),
        )
        ctx.eps = norm.eps, branch.eps if branch is not None else 0.0
        ctx.how = activation, kept is x, engine
        if not keeps_sum:
            return y
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        kept, x, mean, var, weight, bias, *rest = ctx.saved_tensors
        norm = Affine(mean, var, weight, bias, ctx.eps[0])
        branch = Affine._make((*rest, ctx.eps[1])) if rest else None
        activation, kept_is_input, engine = ctx.how
        needs = ctx.needs_input_grad[:4]
        grad = grads[0]
        if len(grads) == 2 and grads[1] is not None:
            # Only a double backward gives the sum a gradient of its own, past the activation.
            parts = [aten.backward(grads[1], norm, branch, None, None, False, x, needs)]
            if grad is not None:
                parts.append(aten.backward(grad, norm, branch, activation, kept, False, x, needs))
            columns = zip(*parts, strict=True)
            return (*(sum(g[1:], g[0]) if g[0] is not None else None for g in columns), *_NOTHING)
        if grad is None:
            return (None, None, None, None, *_NOTHING)
        args = (grad, norm, branch, activation, kept, kept_is_input, x, needs)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _intercepted(grad):
            return (*aten.backward(*args), *_NOTHING)
        return (*engine.backward(*args), *_NOTHING)


_NOTHING = (None, None, None, None)


def _apply(
    x: Tensor,
    norm: Affine,
    residual: Tensor | None,
    branch: Affine | None,
    activation: str | None,
) -> Tensor:
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS if name is not None)
        raise ValueError(f"There is no activation {activation!r}; there are {names} and None.")
    if torch._C._get_tracing_state() is not None:
        # Under jit.trace a shape is a traced value, and to compare it a warning.
        return aten.forward(x, norm, residual, branch, activation)[0]
    if x.dim() < 2 or x.shape[1] != norm.mean.shape[0]:
        raise ValueError(
            f"The input has the shape {tuple(x.shape)}; it must be (N, C, *) with "
            f"C = {norm.mean.shape[0]} channels, as the running statistics have."
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"The residual has the shape {tuple(residual.shape)} and the input "
            f"{tuple(x.shape)}; they must agree, a residual is not broadcast."
        )
    if _why_formula(x, norm, residual, branch):
        if not x.is_floating_point():
            raise TypeError(f"The input must be of a floating dtype; it is {x.dtype}.")
        return aten.forward(x, norm, residual, branch, activation)[0]
    engine, _ = _engine(x, norm, residual, branch)
    weight, bias = norm.weight, norm.bias
    if torch.is_grad_enabled():
        trained = (weight is not None and weight.requires_grad) or (
            bias is not None and bias.requires_grad
        )
        if trained or x.requires_grad or (residual is not None and residual.requires_grad):
            out = _FrozenBatchNorm.apply(
                x, residual, weight, bias, norm, branch, activation, engine
            )
            return out if isinstance(out, Tensor) else out[0]
    return engine.forward(x, norm, residual, branch, activation, keep_sum=False)[0]


_PLAIN = frozenset({Tensor, nn.Parameter})
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


def _why_formula(x: Tensor, norm: Affine, residual: Tensor | None, branch: Affine | None) -> str:
    """Why a call must be plain differentiable ATen, as a sentence; empty if it need not be."""
    # First, for torch.compile follows only this branch and sees nothing of the rest.
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is at work, which fuses plain ATen by itself."
    if x.dtype not in _FLOATS or x.layout is not torch.strided:
        return "The input is not a dense tensor of fp16, bf16, fp32 or fp64."
    mean, var, weight, bias, _ = norm
    if (
        type(x) not in _PLAIN
        or type(mean) not in _PLAIN
        or type(var) not in _PLAIN
        or (weight is not None and type(weight) not in _PLAIN)
        or (bias is not None and type(bias) not in _PLAIN)
        or (residual is not None and type(residual) not in _PLAIN)
    ):
        return "One of the tensors is of a tensor subclass."
    if mean.requires_grad or var.requires_grad:
        return "The statistics require grad."
    if branch is not None:
        for tensor in branch[:4]:
            if tensor is not None and (tensor.requires_grad or type(tensor) not in _PLAIN):
                return "The branch's norm layer is trained, or is of a tensor subclass."
    return _intercepted(x)


def _intercepted(x: Tensor) -> str:
    """Who else listens to operations on ``x``, as a sentence; empty if nobody does."""
    if type(x) not in _PLAIN:
        return "One of the tensors is of a tensor subclass."
    if torch._C._are_functorch_transforms_active():
        return "A torch.func transform (vmap, grad, jvp) is active."
    if torch._C._len_torch_dispatch_stack():
        return "A torch dispatch mode is active."
    if torch._C._len_torch_function_stack() and any(
        # torch.set_default_device is a mode as well, and concerns factory functions only.
        type(mode) is not DeviceContext
        for mode in _function_modes()  # type: ignore[no-untyped-call]
    ):
        return "A torch function mode is active."
    if forward_ad._current_level >= 0:
        return "Forward-mode differentiation is active."
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is at work."
    return ""


def _engine(
    x: Tensor, norm: Affine, residual: Tensor | None, branch: Affine | None
) -> tuple[_Engine, str]:
    """Choose what computes on plain eager tensors, and say why."""
    return _ATEN, "The input is not on a CUDA device."
