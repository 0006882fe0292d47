"""What the kernel requires of tensors: dtypes, devices, sizes, layouts. Checked in every call."""

from __future__ import annotations

import torch
from torch import Tensor

from bnfreeze.nn.cuda.plan import Dtype
from bnfreeze.nn.reference import Norm

__all__ = ["DTYPES", "KINDS", "is_dense", "joins", "like", "pointer", "serves"]

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_FP32 = torch.float32


def is_dense(x: Tensor) -> bool:
    """Whether a tensor is contiguous or channels_last: the layouts that the kernel supports."""
    return x.is_contiguous() or _is_channels_last(x)


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return ``tensor`` in the memory layout of ``x``, copied if necessary."""
    if x.is_contiguous():
        return tensor.contiguous()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return tensor.contiguous(memory_format=last)


def joins(residual: Tensor, x: Tensor) -> bool:
    """Whether the two can be added without a copy or a cast."""
    return (
        residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.get_device() == x.get_device()
        and not residual.is_neg()
    )


def serves(norm: Norm, channels: int, device: int) -> bool:
    """Whether a norm layer's tensors have the shape (C,), contiguous, on the device."""
    # Written out, because a call takes as long as three of these checks.
    mean, var, weight, bias, _ = norm
    return (
        mean.dtype is _FP32
        and mean.numel() == channels
        and mean.get_device() == device
        and mean.is_contiguous()
        and var.dtype is _FP32
        and var.numel() == channels
        and var.get_device() == device
        and var.is_contiguous()
        and (
            weight is None
            or (
                weight.dtype in KINDS
                and weight.numel() == channels
                and weight.get_device() == device
                and weight.is_contiguous()
            )
        )
        and (
            bias is None
            or (
                bias.dtype in KINDS
                and bias.numel() == channels
                and bias.get_device() == device
                and bias.is_contiguous()
                and (weight is None or weight.dtype is bias.dtype)
            )
        )
    )


def pointer(tensor: Tensor | None) -> int:
    """The address of the first element; 0 without a tensor."""
    return 0 if tensor is None else tensor.data_ptr()
