"""The policy `folded`: a frozen norm layer as a part of the convolution before it.

A frozen norm layer scales and shifts each channel, and so does a convolution::

    (conv(x, w, b) − mean) · s + bias = conv(x, w · s, (b − mean) · s + bias)
    s = weight / sqrt(var + eps)

The weight is folded at every call, which costs little: so it trains as before, and a value that was
loaded or written in between always counts. Backward folds it again, so that no second copy of every
weight is kept.

On a CPU, oneDNN adds the residual in the same pass. Its activations would turn NaN into 0 and make
a model that has diverged look healthy, so the activation follows in place.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bnfreeze.fusion.sums import norm_add
from bnfreeze.nn.activations import ACTIVATIONS, FROM_OUTPUT, IN_PLACE
from bnfreeze.nn.eager import PLAIN
from bnfreeze.policies.fused import has_hooks, own_activation
from bnfreeze.policies.record import layer_class
from bnfreeze.torch_private import Convolution, convolution_add

__all__ = ["conv_norm_add", "why_not_folded"]

# The rank of the input for which the norm layer's channels are the convolution's.
_RANKS: dict[type, int] = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
_HALF = (torch.bfloat16, torch.float16)


def why_not_folded(module: nn.Module, layer: Any) -> str:
    """Return why a norm layer cannot be folded into the module before it; empty if it can."""
    kind = layer_class(module)
    if _RANKS.get(type(module)) not in layer._ranks:
        return f"{kind.__name__} comes before it"
    if has_hooks(module):
        return f"{kind.__name__} has a hook"
    if isinstance(getattr(module, "padding", 0), str):
        return "the convolution's padding is not a number"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return "the convolution does not pad with zeros"
    return ""


def conv_norm_add(
    conv: Any,
    layer: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    branch: None,
    in_place: bool,
    swapped: bool,
) -> Tensor:
    """Compute ``activation(layer(conv(x)) + residual)``, folded where that gives the same.

    Args:
        conv: a convolution or a linear layer.
        layer: the frozen norm layer after it.
        x: the input of `conv`.
        residual: what is added, or None.
        activation: its name, or None.
        branch: None; for `norm_add`.
        in_place: as for `norm_add`.
        swapped: as for `norm_add`.
    """
    dtype = _dtype(conv, layer, x)
    if dtype is None:
        y = conv(x)
        if residual is None:
            return layer(y, None, activation)  # type: ignore[no-any-return]
        return norm_add(layer, y, residual, activation, branch, in_place, swapped)
    how: Convolution | None = None
    if type(conv) is not nn.Linear:
        how = conv.stride, conv.padding, conv.dilation, conv.groups
    added = residual if _can_be_added(residual, x, conv.weight, how, dtype) else None
    args = x.to(dtype), conv.weight, conv.bias, added
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in args):
        y = _Folded.apply(*args, layer._norm(), how)
    else:
        y = _folded(*args, layer._norm(), how)[0]
    if residual is not None and added is None:
        if in_place:
            y += residual
        else:
            y = residual + y if swapped else y + residual
    activation = own_activation(layer) or activation
    if activation is None:
        return y
    # Nobody else has y; but autograd needs it as it is if the activation goes backward from it.
    in_place = type(y) is Tensor and (activation in FROM_OUTPUT or not y.requires_grad)
    return (IN_PLACE if in_place else ACTIVATIONS)[activation](y)


def _dtype(conv: Any, layer: Any, x: Tensor) -> torch.dtype | None:
    """The dtype in which the folded convolution runs; None if the two layers must be called."""
    weight, bias = conv.weight, conv.bias
    # On CUDA no GPU has shown yet that folding is faster than the kernel.
    if type(x) not in PLAIN or not x.is_cpu or x.layout is not torch.strided:
        return None
    # With other ranks the norm layer's channels are not the convolution's.
    if x.dim() != _RANKS[type(conv)] or getattr(conv, "padding_mode", "zeros") != "zeros":
        return None
    *norm, _ = layer._norm()
    for tensor in (weight, *(t for t in (bias, *norm) if t is not None)):
        if type(tensor) not in PLAIN or not tensor.is_cpu or tensor.layout is not torch.strided:
            return None
    if any(t is not None and t.requires_grad for t in norm):
        return None  # thawed by hand
    if norm[0].numel() != weight.shape[0] or own_activation(layer) is None:
        return None
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        floats = (torch.float32, *_HALF)
        return dtype if x.dtype in floats and weight.dtype in floats else None
    fits = weight.dtype is dtype and (bias is None or bias.dtype is dtype)
    return dtype if fits and dtype in (torch.float32, torch.float64, *_HALF) else None


def _can_be_added(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    how: Convolution | None,
    dtype: torch.dtype,
) -> bool:
    """Whether the residual has the convolution's dtype and shape, so that adding keeps both."""
    if type(residual) not in PLAIN or residual.dtype is not dtype or not residual.is_cpu:
        return False
    sizes = []
    if how is not None:
        stride, padding, dilation, _ = how
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        ]
    return residual.shape == (x.shape[0], weight.shape[0], *sizes)


def _folded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Any,
    how: Convolution | None,
) -> tuple[Tensor, Tensor]:
    """Return the folded convolution's output, and the scale of each channel."""
    mean, var, gamma, beta, eps = norm
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = (-mean if bias is None else bias - mean) * scale
    if beta is not None:
        shift = shift + beta
    weight, shift = _scaled(weight, scale, x.dtype), shift.to(x.dtype)
    if how is None:
        y = nn.functional.linear(x, weight, shift)
    elif residual is not None and torch.backends.mkldnn.enabled and _adds(x.dtype, x.dim()):
        return convolution_add(x, weight, shift, residual, how), scale
    else:
        y = _CONVOLUTIONS[x.dim()](x, weight, shift, *how)
    return y if residual is None else y.add_(residual), scale


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight folded in the precision of the statistics, at least fp32, and rounded once."""
    return (weight * scale.view(-1, *[1] * (weight.dim() - 1))).to(dtype)


class _Folded(torch.autograd.Function):
    """Saves the input and the raw weight, as the convolution alone would."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        norm: Any,
        how: Convolution | None,
    ) -> Tensor:
        y, scale = _folded(x, weight, bias, residual, norm, how)
        ctx.save_for_backward(x, weight)
        ctx.how = scale, how
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        scale, how = ctx.how
        needs = ctx.needs_input_grad
        folded = _scaled(weight, scale, x.dtype)
        if how is None:
            grad_x = grad @ folded if needs[0] else None
            grad_weight = grad.mT @ x if needs[1] else None
            grad_bias = grad.sum(0) if needs[2] else None
        else:
            stride, padding, dilation, groups = how
            grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, x, folded, [weight.shape[0]], stride, padding, dilation,
                False, [0] * len(stride), groups, needs[:3],
            )  # fmt: skip
        if needs[1]:
            grad_weight = _scaled(grad_weight, scale, weight.dtype)
        if needs[2]:
            grad_bias = (grad_bias * scale).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, grad if needs[3] else None, None, None


@functools.cache
def _adds(dtype: torch.dtype, rank: int) -> bool:
    """Whether oneDNN's convolution with an add is there and agrees with the two steps."""
    how: Convolution = ([1] * (rank - 2), [1] * (rank - 2), [1] * (rank - 2), 2)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for value, count in ((2.0, 2), (float("nan"), 2), (float("inf"), 2), (2.0, 0)):
                x = torch.linspace(-1, 1, 2 * 4 * 4 ** (rank - 2)).view(2, 4, *[4] * (rank - 2))
                x[0].view(-1)[5] = value
                x = x[:count].to(dtype)
                weight = torch.linspace(-1, 1, 8 * 3 ** (rank - 2)).to(dtype)
                weight, shift = weight.view(4, 2, *[3] * (rank - 2)), x.new_ones(4)
                expected = _CONVOLUTIONS[rank](x, weight, shift, *how) + x
                found = convolution_add(x, weight, shift, x, how)
                close = torch.allclose(found, expected, 2e-2, 2e-2, equal_nan=True)
                if not close or found.dtype is not dtype or found.stride() != expected.stride():
                    return False
    except Exception:  # a build of torch without it may raise anything
        return False
    return True
