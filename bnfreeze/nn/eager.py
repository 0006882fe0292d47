"""Which calls are plain and eager, so that they may take the fast path.

Compilers, torch.func transforms, modes and tensor subclasses must see each operation. For them a
call is the formula in plain differentiable ATen. These questions are asked in every call, so they
are written out without helpers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling as _is_compiling

from bnfreeze.nn.reference import Norm
from bnfreeze.torch_private import (
    DeviceContext,
    _are_functorch_transforms_active,
    _get_current_function_mode_stack,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    forward_ad,
)

__all__ = ["PLAIN", "TRACING", "backward_needs_formula", "why_formula"]

# The types of a plain tensor. A subclass may do anything.
PLAIN = frozenset({Tensor, nn.Parameter})
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})

_COMPILING = "torch.compile or torch.export is running; it fuses plain ATen by itself."
TRACING = "torch.jit.trace is running."


def why_formula(x: Tensor, norm: Norm, residual: Tensor | None, branch: Norm | None) -> str:
    """Return why a call needs the plain differentiable formula; empty if it does not."""
    # This comes first, because torch.compile follows only this branch and sees nothing else.
    if _is_compiling():
        return _COMPILING
    if (  # the questions of observer, without the price of a call
        _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    ) and (why := observer()):
        return why
    mean, var, weight, bias, _ = norm
    if (
        type(x) not in PLAIN
        or type(mean) not in PLAIN
        or type(var) not in PLAIN
        or (weight is not None and type(weight) not in PLAIN)
        or (bias is not None and type(bias) not in PLAIN)
        or (residual is not None and type(residual) not in PLAIN)
    ):
        return "One of the tensors is of a tensor subclass."
    if x.dtype not in _FLOATS or x.layout is not torch.strided:
        return "The input is not a dense tensor of fp16, bf16, fp32 or fp64."
    if mean.requires_grad or var.requires_grad:
        return "The statistics require grad."
    if branch is not None:
        for tensor in branch[:4]:
            if tensor is not None and (tensor.requires_grad or type(tensor) not in PLAIN):
                return "The branch's norm layer trains, or has a tensor subclass."
    return ""


def observer() -> str:
    """Return what observes every operation, as a sentence; empty if nothing does."""
    if _are_functorch_transforms_active():
        return "A torch.func transform (vmap, grad, jvp) is active."
    if _len_torch_dispatch_stack():
        return "A torch dispatch mode is active."
    if _len_torch_function_stack() and any(
        # torch.set_default_device is a mode too, but it only concerns factory functions.
        type(mode) is not DeviceContext
        for mode in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    ):
        return "A torch function mode is active."
    if forward_ad._current_level >= 0:
        return "Forward-mode differentiation is active."
    if _get_tracing_state() is not None:
        return TRACING
    return ""


def backward_needs_formula(grad: Tensor) -> bool:
    """Whether a backward pass must use plain differentiable ATen."""
    return (
        torch.is_grad_enabled()
        or _is_compiling()
        or type(grad) not in PLAIN
        or grad.layout is not torch.strided
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or (_len_torch_function_stack() > 0 and observer() != "")
    )
