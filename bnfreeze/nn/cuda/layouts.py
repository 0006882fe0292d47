"""What the kernel requires of tensors: dtypes, devices, sizes, layouts. Checked in every call."""

from __future__ import annotations

import torch
from torch import Tensor

from bnfreeze.nn.cuda.plan import Dtype
from bnfreeze.nn.reference import Norm

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
_FP32 = torch.float32
# How the kernel knows the dtype of weight and bias.
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

UNUSUAL = (
    "Statistics, weight or bias have an unusual dtype, size, stride or device: "
    "the statistics must be fp32, weight and bias of one dtype, on the input's device."
)


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


def unsupported(x: Tensor, residual: Tensor | None) -> str:
    """Return why the kernel does not support these tensors; empty if it does."""
    shape = x.shape
    channels = shape[1] if len(shape) > 1 else 0
    if not channels:
        return "The input has no channels."
    if x.dtype not in DTYPES:
        return "The input is fp64."
    if not is_dense(x):
        return "The input is neither contiguous nor channels_last."
    if x.is_neg():
        return "The input is a lazily negated view."
    if channels >= 2**23 or x.numel() // channels >= 2**30:
        return "The input is too large."
    if residual is not None and not (
        residual.shape == shape
        and residual.dtype is x.dtype
        and residual.get_device() == x.get_device()
        and not residual.is_neg()
    ):
        return "The residual has another shape, dtype or device than the input, or is negated."
    return ""


def parameters(
    norm: Norm, channels: int, device: int
) -> tuple[int, int, int, int, float, int] | None:
    """The addresses of a norm layer's tensors, its eps, and the dtype of weight and bias.

    None if a tensor is `UNUSUAL`: each must have the shape (C,), contiguous, on the device.
    """
    mean, var, weight, bias, eps = norm
    for tensor in (mean, var, weight, bias):
        if tensor is not None and not (
            tensor.numel() == channels and tensor.get_device() == device and tensor.is_contiguous()
        ):
            return None
    one = bias if weight is None else weight
    dtype = _FP32 if one is None else one.dtype
    if not (mean.dtype is var.dtype is _FP32 and dtype in _KINDS):
        return None
    if bias is not None and bias.dtype is not dtype:
        return None
    return (
        mean.data_ptr(),
        var.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        eps,
        _KINDS[dtype],
    )
