"""For the first run on a GPU: a norm layer folded into cuDNN's convolution, with its epilogue.

cuDNN computes ``relu(conv(x, w) + bias + residual)`` in one kernel, which has no derivative of its
own and is given one here. It is measured beside bnfreeze's kernel, to see which of them is to stay.
This knows only torchvision's ResNets and is no part of bnfreeze.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torchvision.models import resnet


class FoldedEpilogue(nn.Module):
    """A convolution without bias, and behind it a frozen norm layer, a residual and a ReLU."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        norm, conv = self.norm, self.conv
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        bias = norm.bias - norm.running_mean * scale
        if not relu:
            return conv._conv_forward(x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):
            half = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(half), weight.to(half), bias.to(half)
            residual = None if residual is None else residual.to(half)
        how = conv.stride, conv.padding, conv.dilation, conv.groups
        return _ConvolutionReLU.apply(x, weight, bias, residual, how)


class _ConvolutionReLU(torch.autograd.Function):
    """``relu(conv(x, weight, bias) + residual)``; keeps x, the weight and the output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, how: tuple
    ) -> Tensor:
        stride, padding, dilation, groups = ctx.how = how
        if not x.is_cuda:
            y = F.conv2d(x, weight, bias, *how)
            y = (y if residual is None else y.add_(residual)).relu_()
        elif residual is None:
            y = torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        else:
            y = torch.cudnn_convolution_add_relu(
                x, weight, residual, 1.0, bias, stride, padding, dilation, groups
            )
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, y = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )  # fmt: skip
        return grad_x, grad_weight, None, grad if ctx.needs_input_grad[3] else None, None


def fold(model: nn.Module) -> None:
    """Fold each norm layer of a ResNet into the convolution before it."""
    for module in list(model.modules()):
        names = dict(module.named_children())
        pairs = [(f"conv{n}", f"bn{n}") for n in "123"]
        if isinstance(module, nn.Sequential):
            pairs = [("0", "1")]  # the downsample branch
        for conv, norm in pairs:
            if isinstance(names.get(norm), nn.BatchNorm2d):
                setattr(module, conv, FoldedEpilogue(names[conv], names[norm]))
                setattr(module, norm, nn.Identity())
        if isinstance(module, resnet.Bottleneck):
            module.__class__ = _FoldedBottleneck


class _FoldedBottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        branch = x if self.downsample is None else self.downsample(x)
        out = self.conv2(self.conv1(x, relu=True), relu=True)
        return self.conv3(out, branch, relu=True)
