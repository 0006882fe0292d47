"""What the kernel requires of tensors: dtypes, devices, sizes, layouts. Checked in every call."""

from __future__ import annotations

import torch
from torch import Tensor

from bnfreeze.nn.cuda.plan import Dtype
from bnfreeze.nn.reference import Norm

__all__ = ["DTYPES", "KINDS", "fits", "is_dense", "like", "unsupported"]

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_FP32 = torch.float32


def is_dense(x: Tensor) -> bool:
    """Whether a tensor is contiguous or channels_last: the layouts that the kernel supports."""
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return ``tensor`` in the memory layout of ``x``, copied if necessary."""
    if x.is_contiguous():
        # Asking takes a fifth of the time of contiguous().
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return tensor.contiguous(memory_format=last)


def unsupported(x: Tensor, norm: Norm, residual: Tensor | None, branch: Norm | None) -> str:
    """Return why the kernel does not support these tensors; empty if it does.

    Only their size is not looked at.
    """
    shape, device = x.shape, x.get_device()
    channels = shape[1] if len(shape) > 1 else 0
    if not channels:
        return "The input has no channels."
    if x.dtype not in DTYPES:
        return "The input is fp64."
    if not is_dense(x):
        return "The input is neither contiguous nor channels_last."
    if x.is_neg():
        return "The input is a lazily negated view."
    if residual is not None and not (
        residual.shape == shape
        and residual.dtype is x.dtype
        and residual.get_device() == device
        and not residual.is_neg()
    ):
        return "The residual has another shape, dtype or device than the input, or is negated."
    if not fits(norm, channels, device) or (
        branch is not None and not fits(branch, channels, device)
    ):
        return (
            "Statistics, weight or bias have an unusual dtype, size, stride or device: "
            "the statistics must be fp32, weight and bias of one dtype, on the input's device."
        )
    return ""


def fits(norm: Norm, channels: int, device: int) -> bool:
    """Whether a norm layer's tensors have the shape (C,), contiguous, on the device."""
    mean, var, weight, bias, _ = norm
    for tensor in (mean, var, weight, bias):
        if tensor is not None and not (
            tensor.numel() == channels and tensor.get_device() == device and tensor.is_contiguous()
        ):
            return False
    one = weight if weight is not None else bias
    dtype = _FP32 if one is None else one.dtype
    return (
        mean.dtype is var.dtype is _FP32
        and dtype in KINDS
        and (bias is None or bias.dtype is dtype)
    )
