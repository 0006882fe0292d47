"""The policy `folded`: a frozen norm layer as a part of the convolution before it.

A frozen norm layer scales and shifts each channel, and so does a convolution::

    (conv(x, w, b) − mean) · s + bias = conv(x, w · s, (b − mean) · s + bias)
    s = weight / sqrt(var + eps)

The weight is folded at every call, which costs little: so it trains as before, and a value that was
loaded or written in between always counts. Where it has many more elements than the output, as in
the last stage of a ResNet, the two layers run one after another: that is cheaper. No folded weight
that backward keeps is larger than the output.

The residual add and the activation follow in place. oneDNN has a convolution that does both in the
same pass. But its ReLU turns NaN into 0, so that a model that has diverged would look healthy, and
its add was measured to be no faster than an add in place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bnfreeze.fusion.sums import norm_add
from bnfreeze.nn.activations import ACTIVATIONS, FROM_OUTPUT
from bnfreeze.nn.eager import PLAIN
from bnfreeze.nn.reference import Norm
from bnfreeze.policies.fused import has_hooks, own_activation
from bnfreeze.policies.record import layer_class

# The rank of the input for which the norm layer's channels are the convolution's.
_RANKS: dict[type, int] = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
_AUTOCAST = frozenset({torch.float32, torch.bfloat16, torch.float16})
_FLOATS = _AUTOCAST | {torch.float64}


def why_not_folded(module: nn.Module, layer: Any) -> str:
    """Return why a norm layer cannot be folded into the module before it; empty if it can."""
    kind = layer_class(module).__name__
    if _RANKS.get(type(module)) not in layer._ranks:
        return f"{kind} comes before it"
    if has_hooks(module):
        return f"{kind} has a hook"
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
        in_place: as for `norm_add`.
        swapped: as for `norm_add`.
    """
    norm, own = layer._norm(), own_activation(layer)
    dtype = None if own is None else _dtype(conv, norm, x)
    if dtype is None:
        y = conv(x)
        if residual is None:
            return layer(y, None, activation)  # type: ignore[no-any-return]
        return norm_add(layer, y, residual, activation, in_place, swapped)
    y = _folded(x if x.dtype is dtype else x.to(dtype), conv, norm)
    if residual is not None:
        # Neither broadcast nor promoted, nor of other strides, on which the left side decides: so
        # it can be written over the convolution's output.
        same = type(residual) in PLAIN and residual.shape == y.shape and residual.dtype is dtype
        if in_place or (same and residual.is_cpu and residual.stride() == y.stride()):
            y += residual
        else:
            y = residual + y if swapped else y + residual
    activation = own or activation
    # Nobody else has y; but autograd needs it as it is if the activation goes backward from it.
    overwrite = type(y) is Tensor and (activation in FROM_OUTPUT or not y.requires_grad)
    return ACTIVATIONS[activation](y, inplace=overwrite)


def _dtype(conv: Any, norm: Norm, x: Tensor) -> torch.dtype | None:
    """The dtype in which the folded convolution runs; None if the two layers must be called."""
    mean, var, gamma, beta, _ = norm
    weight, bias, shape, dtype = conv.weight, conv.bias, x.shape, x.dtype
    # With other ranks the norm layer's channels are not the convolution's.
    if len(shape) != _RANKS[type(conv)] or mean.numel() != weight.shape[0]:
        return None
    for tensor in (x, weight, bias, mean, var, gamma, beta):
        if tensor is not None and type(tensor) not in PLAIN:
            return None
    # On CUDA no GPU has shown yet that folding is faster than the kernel.
    if not (x.is_cpu and x.layout is weight.layout is torch.strided):
        return None
    if (gamma is not None and gamma.requires_grad) or (beta is not None and beta.requires_grad):
        return None  # thawed by hand
    if getattr(conv, "padding_mode", "zeros") != "zeros":
        return None
    # Scaling the output is cheaper than scaling a much larger weight, and needs no scaled weight
    # for backward.
    positions = shape[0] * math.prod(shape[2:])
    elements = weight.numel() // weight.shape[0] * math.prod(getattr(conv, "stride", ()))
    kept = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
    if elements > positions * (1 if kept else 4) > 0:
        return None
    if torch.is_autocast_enabled("cpu"):
        lower = dtype in _AUTOCAST and weight.dtype in _AUTOCAST
        return torch.get_autocast_dtype("cpu") if lower else None
    same = weight.dtype is dtype and (bias is None or bias.dtype is dtype)
    return dtype if same and dtype in _FLOATS else None


def _folded(x: Tensor, conv: Any, norm: Norm) -> Tensor:
    """The convolution, folded in the precision of the statistics (at least fp32), rounded once."""
    mean, var, gamma, beta, eps = norm
    weight, bias = conv.weight, conv.bias
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = (mean if bias is None else mean - bias) * scale
    shift = -shift if beta is None else beta - shift
    weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    if weight.dtype is not x.dtype or shift.dtype is not x.dtype:
        weight, shift = weight.to(x.dtype), shift.to(x.dtype)
    if type(conv) is nn.Linear:
        return nn.functional.linear(x, weight, shift)
    how = conv.stride, conv.padding, conv.dilation, conv.groups
    return _CONVOLUTIONS[x.dim()](x, weight, shift, *how)
