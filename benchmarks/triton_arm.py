# ruff: noqa: N803 - constants of a Triton kernel are in capitals
"""For the first run on a GPU: frozen batch norm with what follows it, written in Triton.

It is measured beside bnfreeze's CUDA kernel, to see which of them is to stay. It knows only
torchvision's ResNets and is no part of bnfreeze. Without a GPU, ``TRITON_INTERPRET=1`` runs it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torchvision.models import resnet

_BLOCK = 2048


@triton.jit
def _forward(
    x, residual, y, scale, shift, n, channels, inner,
    ADDS: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    channel = (at // inner) % channels
    value = tl.load(x + at, here).to(tl.float32)
    value = value * tl.load(scale + channel, here) + tl.load(shift + channel, here)
    if ADDS:
        value += tl.load(residual + at, here).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    tl.store(y + at, value.to(y.dtype.element_ty), here)


@triton.jit
def _backward(
    grad, y, grad_x, grad_residual, scale, n, channels, inner,
    ADDS: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    value = tl.load(grad + at, here).to(tl.float32)
    if RELU:  # NaN passes the gradient on, as in torch
        value = tl.where(tl.load(y + at, here).to(tl.float32) <= 0, 0.0, value)
    if ADDS:
        tl.store(grad_residual + at, value.to(grad_residual.dtype.element_ty), here)
    value *= tl.load(scale + (at // inner) % channels, here)
    tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), here)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, relu: bool
    ) -> Tensor:
        y = torch.empty_like(x)
        adds = residual is not None
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        ctx.how = x.numel(), x.shape[1], 1 if last else x[0, 0].numel()
        ctx.adds, ctx.relu = adds, relu
        _forward[_grid(x)](
            x, residual if adds else x, y, scale, shift, *ctx.how,
            ADDS=adds, RELU=relu, BLOCK=_BLOCK,
        )  # fmt: skip
        ctx.save_for_backward(y if relu else None, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, scale = ctx.saved_tensors
        if y is not None and grad.stride() != y.stride():
            grad = torch.empty_like(y).copy_(grad)
        grad_x = torch.empty_like(grad)
        grad_residual = torch.empty_like(grad) if ctx.adds and ctx.relu else grad
        _backward[_grid(grad)](
            grad, y if ctx.relu else grad, grad_x, grad_residual, scale, *ctx.how,
            ADDS=ctx.adds and ctx.relu, RELU=ctx.relu, BLOCK=_BLOCK,
        )  # fmt: skip
        return grad_x, grad_residual if ctx.adds else None, None, None, None


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), _BLOCK),)


class TritonNorm(nn.Module):
    """A frozen norm layer. Scale and shift are computed once, when it is made."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        with torch.no_grad():
            scale = (norm.weight * torch.rsqrt(norm.running_var + norm.eps)).float()
            shift = norm.bias.float() - norm.running_mean * scale
        self.scale, self.shift = scale.detach(), shift.detach()  # no buffers: they stay in fp32

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if self.scale.device != x.device:
            self.scale, self.shift = self.scale.to(x.device), self.shift.to(x.device)
        return _Fused.apply(x, residual, self.scale, self.shift, relu)


def replace(model: nn.Module) -> None:
    """Put Triton's layers in a ResNet, with the ReLU and the add that follow them."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, TritonNorm(child))
        if isinstance(module, resnet.Bottleneck):
            module.__class__ = _TritonBottleneck


class _TritonBottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), None, True)
        out = self.bn2(self.conv2(out), None, True)
        branch = x if self.downsample is None else self.downsample(x)
        return self.bn3(self.conv3(out), branch, True)
