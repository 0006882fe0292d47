"""An experiment: the norm layer's scale folded into the convolution's weight, at each step.

A frozen norm layer is linear, and a linear map after a convolution is a convolution::

    s · conv(x, w) + (b − m·s) = conv(x, s·w, b − m·s)        s = weight / sqrt(var + eps)

so that no pass over the feature map is left of it. The weight still trains: its gradient is that of
``s·w``, times ``s``. (You and others 2023, arXiv:2305.11624; MMEngine and Inductor have it.) On top
of that, the bias, the residual and the ReLU can go into the epilogue of cuDNN's convolution, which
has no derivative of its own and is given one here.

This is the benchmark's own, not a part of bnfreeze, and knows only torchvision's ResNets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torchvision.models import resnet


class Folded(nn.Module):
    """A convolution without bias and the frozen norm layer behind it, as one convolution."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.conv._conv_forward(x, *self.weight_and_bias())


class FoldedOnce(Folded):
    """The same for a weight that does not train: folded when made, and stale if it ever changes."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__(conv, norm)
        with torch.no_grad():
            for name, tensor in zip(("folded", "shift"), self.weight_and_bias(), strict=True):
                self.register_buffer(name, tensor.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv._conv_forward(x, self.folded, self.shift)


class FoldedEpilogue(Folded):
    """`Folded`, with the residual and the ReLU in the convolution's own epilogue."""

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if not relu:
            return super().forward(x)
        weight, bias = self.weight_and_bias()
        if torch.is_autocast_enabled(x.device.type):
            half = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(half), weight.to(half), bias.to(half)
            residual = None if residual is None else residual.to(half)
        conv = self.conv
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


def fold(model: nn.Module, folded: type[Folded] = Folded) -> None:
    """Fold each norm layer of a ResNet into the convolution before it."""
    for module in list(model.modules()):
        names = dict(module.named_children())
        pairs = [(f"conv{n}", f"bn{n}") for n in "123"]
        if isinstance(module, nn.Sequential):
            pairs = [("0", "1")]  # the downsample branch
        for conv, norm in pairs:
            if isinstance(names.get(norm), nn.BatchNorm2d):
                setattr(module, conv, folded(names[conv], names[norm]))
                setattr(module, norm, nn.Identity())
        if folded is FoldedEpilogue and isinstance(module, resnet.Bottleneck):
            module.__class__ = _FoldedBottleneck


class _FoldedBottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        branch = x if self.downsample is None else self.downsample(x)
        out = self.conv2(self.conv1(x, relu=True), relu=True)
        return self.conv3(out, branch, relu=True)
