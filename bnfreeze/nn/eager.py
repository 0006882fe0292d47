"""Which calls are plain and eager, so that they may take the fast path.

Compilers, torch.func transforms, modes and tensor subclasses must see each operation. For them a
call is the formula in plain differentiable ATen. These questions are asked in every call.
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

# The types of a plain tensor. A subclass may do anything.
PLAIN = frozenset({Tensor, nn.Parameter})
_PLAIN_OR_NONE = PLAIN | {type(None)}
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})

_COMPILING = "torch.compile or torch.export is running; it fuses plain ATen by itself."
TRACING = "torch.jit.trace is running."


def why_formula(x: Tensor, norm: Norm, residual: Tensor | None, branch: Norm | None) -> str:
    """Return why a call needs the plain differentiable formula; empty if it does not."""
    # This comes first, because torch.compile follows only this branch and sees nothing else.
    if _is_compiling():
        return _COMPILING
    if why := observer():
        return why
    mean, var, weight, bias, _ = norm
    if not (  # written out: a loop would take twice as long
        type(x) in PLAIN
        and type(mean) in PLAIN
        and type(var) in PLAIN
        and type(weight) in _PLAIN_OR_NONE
        and type(bias) in _PLAIN_OR_NONE
        and type(residual) in _PLAIN_OR_NONE
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
        torch.is_grad_enabled()  # a double backward will follow
        or _is_compiling()
        or type(grad) not in PLAIN
        or grad.layout is not torch.strided
        or observer() != ""
    )
