"""Frozen batch norm as a function, with the residual and the activation that follow it.

One question is asked of every call: may it take the fused CUDA kernel, may it at least take ATen
with a backward of our own that saves next to nothing, or must it be plain differentiable ATen?
`backend` answers it in words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch._C import _get_tracing_state as _tracing_state
from torch._C import _len_torch_dispatch_stack as _dispatch_modes
from torch._C import _len_torch_function_stack as _function_modes
from torch.autograd import forward_ad
from torch.compiler import is_compiling as _is_compiling
from torch.overrides import _get_current_function_mode_stack as _function_mode_stack
from torch.utils._device import DeviceContext

from bnfreeze import aten
from bnfreeze.aten import ACTIVATIONS, FROM_OUTPUT, Affine
from bnfreeze.kernels.build import KernelError
from bnfreeze.kernels.load import kernel as _kernel

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
    device of ``x``. Where it would be the kernel, it is launched once on the first image, so that a
    kernel which cannot be had is not promised.
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
    if engine is not _ATEN:
        try:
            engine.forward(x[:1].detach(), norm, None, None, None)
        except KernelError as error:
            _kernel.give_up(error)
            engine, why = _ATEN, _kernel.trouble
    return Backend(engine.path, why)


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Engine(Protocol):
    """What computes on plain eager tensors: called as the functions of `bnfreeze.aten`."""

    @property
    def path(self) -> Literal["kernel", "aten"]: ...

    @property
    def forward(self) -> Callable[..., tuple[Tensor, Tensor | None]]: ...

    @property
    def backward(self) -> Callable[..., Grads]: ...


class _Aten:
    """ATen, which anything that the kernel cannot do falls back to."""

    path: Literal["kernel", "aten"] = "aten"
    forward = staticmethod(partial(aten.forward, mixed=True))
    backward = staticmethod(partial(aten.backward, mixed=True))


_ATEN: _Engine = _Aten()


class _FrozenBatchNorm(torch.autograd.Function):
    """Saves the least: what each activation needs, and ``x`` only for the gradient of weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        how: tuple[Affine, Affine | None, str | None, _Engine],
    ) -> Any:
        norm, branch, activation, engine = ctx.how = how
        # With a residual the sum cannot be had from x alone; it becomes a second output, so that
        # a double backward finds its way through it.
        from_input = activation in _FROM_INPUT
        keeps_sum = from_input and residual is not None
        try:
            y, total = engine.forward(x, norm, residual, branch, activation, keep_sum=keeps_sum)
        except KernelError as error:
            _kernel.give_up(error)
            y, total = _ATEN.forward(x, norm, residual, branch, activation, keep_sum=keeps_sum)
        kept = None
        if activation is not None:
            kept = y if not from_input else total if keeps_sum else x
        ctx.kept_is_input = kept is x
        needs_x = x if ctx.needs_input_grad[2] else None
        # Backward takes the parameters from ctx.how; that they are saved as well makes autograd
        # complain where one of those it reads was changed in between.
        if kept is x or needs_x is not None:
            ctx.save_for_backward(kept, needs_x, norm.var, weight, norm.mean, bias)
        else:
            ctx.save_for_backward(kept, needs_x, norm.var, weight)
        if not keeps_sum:
            return y
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None = None) -> Any:
        kept, x, *_ = ctx.saved_tensors
        norm, branch, activation, engine = ctx.how
        needs = ctx.needs_input_grad[:4]
        rest = (norm, branch, activation, kept, ctx.kept_is_input, x, needs)
        if grad_sum is not None:
            # Only a double backward gives the sum a gradient of its own, past the activation.
            total = aten.backward(grad_sum, norm, branch, None, None, False, x, needs)
            if grad is None:
                return (*total, None)
            more = aten.backward(grad, *rest)
            return (*(_plus(a, b) for a, b in zip(total, more, strict=True)), None)
        if grad is None:
            return None, None, None, None, None
        if torch.is_grad_enabled() or _is_compiling() or _listener() or _is_odd(grad):
            grads = aten.backward(grad, *rest)
        else:
            try:
                grads = engine.backward(grad, *rest)
            except KernelError as error:
                _kernel.give_up(error)
                grads = _ATEN.backward(grad, *rest)
        return (*grads, None)


_FROM_INPUT = frozenset(ACTIVATIONS) - FROM_OUTPUT - {None}


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _apply(
    x: Tensor,
    norm: Affine,
    residual: Tensor | None,
    branch: Affine | None,
    activation: str | None,
) -> Tensor:
    """Compute ``activation(norm(x) + branch(residual))``, as `frozen_batch_norm` describes it."""
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS if name is not None)
        raise ValueError(f"There is no activation {activation!r}; there are {names} and None.")
    why = _why_formula(x, norm, residual, branch)
    # Under jit.trace a size is a traced value, and to compare it a warning.
    if why is not _TRACING:
        shape = x.shape
        if len(shape) < 2 or shape[1] != norm.mean.numel():
            raise ValueError(
                f"The input has the shape {tuple(shape)}; it must be (N, C, *) with "
                f"C = {norm.mean.numel()} channels, as the running statistics have."
            )
        if residual is not None and residual.shape != shape:
            raise ValueError(
                f"The residual has the shape {tuple(residual.shape)} and the input "
                f"{tuple(shape)}; they must agree, a residual is not broadcast."
            )
    if why:
        if not x.is_floating_point():
            raise TypeError(f"The input must be of a floating dtype; it is {x.dtype}.")
        return aten.forward(x, norm, residual, branch, activation)[0]
    engine, _ = _engine(x, norm, residual, branch)
    _, _, weight, bias, _ = norm
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        how = norm, branch, activation, engine
        out: Any = _FrozenBatchNorm.apply(x, residual, weight, bias, how)
        return out[0] if type(out) is tuple else out  # type: ignore[no-any-return]
    try:
        return engine.forward(x, norm, residual, branch, activation)[0]
    except KernelError as error:
        _kernel.give_up(error)
        return _ATEN.forward(x, norm, residual, branch, activation)[0]


_PLAIN = frozenset({Tensor, nn.Parameter})
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})

_COMPILING = "torch.compile or torch.export is at work, which fuses plain ATen by itself."
_TRACING = "torch.jit.trace is at work."


def _why_formula(x: Tensor, norm: Affine, residual: Tensor | None, branch: Affine | None) -> str:
    """Why a call must be plain differentiable ATen, as a sentence; empty if it need not be."""
    # First, for torch.compile follows only this branch and sees nothing of the rest.
    if _is_compiling():
        return _COMPILING
    if (  # what _listener asks, without the price of a call
        _transforms_active()
        or _dispatch_modes()
        or _function_modes()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    ) and (why := _listener()):
        return why
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
    if x.dtype not in _FLOATS or x.layout is not torch.strided:
        return "The input is not a dense tensor of fp16, bf16, fp32 or fp64."
    if mean.requires_grad or var.requires_grad:
        return "The statistics require grad."
    if branch is not None:
        for tensor in branch[:4]:
            if tensor is not None and (tensor.requires_grad or type(tensor) not in _PLAIN):
                return "The branch's norm layer is trained, or is of a tensor subclass."
    return ""


def _listener() -> str:
    """Who wants to see every operation for itself, as a sentence; empty if nobody does."""
    if _transforms_active():
        return "A torch.func transform (vmap, grad, jvp) is active."
    if _dispatch_modes():
        return "A torch dispatch mode is active."
    if _function_modes() and any(
        # torch.set_default_device is a mode as well, and concerns factory functions only.
        type(mode) is not DeviceContext
        for mode in _function_mode_stack()  # type: ignore[no-untyped-call]
    ):
        return "A torch function mode is active."
    if forward_ad._current_level >= 0:
        return "Forward-mode differentiation is active."
    if _tracing_state() is not None:
        return _TRACING
    return ""


def _is_odd(grad: Tensor) -> bool:
    return type(grad) not in _PLAIN or grad.layout is not torch.strided


def _engine(
    x: Tensor, norm: Affine, residual: Tensor | None, branch: Affine | None
) -> tuple[_Engine, str]:
    """Choose what computes on plain eager tensors, and say why."""
    if not _on_cuda(x):
        return _ATEN, "The input is not on a CUDA device."
    launcher = _kernel.launcher or _kernel.load()
    if launcher is None:
        return _ATEN, _kernel.trouble
    refusal = launcher.refusal(x, norm, residual, branch)
    return (_ATEN, refusal) if refusal else (launcher, "Everything suits the CUDA kernel.")


_on_cuda = attrgetter("is_cuda")
