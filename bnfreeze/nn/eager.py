"""Who must see every operation for itself: compilers, transforms, modes, subclasses.

For these a call is plain differentiable ATen; all other tensors are plain and eager, and may be
computed with as is fastest. Asked in every call, so the questions are put without helpers.
"""

from __future__ import annotations

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

from bnfreeze.nn.reference import Norm

__all__ = ["PLAIN", "TRACING", "must_show", "why_formula"]

# No subclass, which may do anything.
PLAIN = frozenset({Tensor, nn.Parameter})
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})

_COMPILING = "torch.compile or torch.export is at work, which fuses plain ATen by itself."
TRACING = "torch.jit.trace is at work."


def why_formula(x: Tensor, norm: Norm, residual: Tensor | None, branch: Norm | None) -> str:
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
        return TRACING
    return ""


def must_show(grad: Tensor) -> bool:
    """Whether a backward pass must be plain differentiable ATen."""
    return (
        torch.is_grad_enabled()
        or _is_compiling()
        or type(grad) not in PLAIN
        or grad.layout is not torch.strided
        or _transforms_active()
        or _dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or (_function_modes() > 0 and _listener() != "")
    )
