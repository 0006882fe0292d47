"""The other libraries that freeze batch norm, and how each of them does it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import nn

# Distribution: the module and the name of what freezes.
HOMES = {
    "torchvision": ("torchvision.ops", "FrozenBatchNorm2d"),
    "timm": ("timm.layers", "freeze_batch_norm_2d"),
    "transformers": ("transformers.models.detr.modeling_detr", "replace_batch_norm"),
    "mmengine": ("mmengine.model.efficient_conv_bn_eval", "turn_on_efficient_conv_bn_eval"),
}
# The same package under another name, without OpenCV.
_ALSO = {"mmengine": "mmengine-lite"}


@cache
def find(peer: str) -> tuple[Any, str]:
    """Return what freezes and its version; or None and why the peer is absent."""
    module, name = HOMES[peer]
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # an incompatible peer may raise anything
        return None, f"absent: {type(error).__name__}: {error}".partition("\n")[0]
    return found, _version(peer)


def _version(peer: str) -> str:
    for name in (peer, _ALSO.get(peer, peer)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def everyone() -> dict[str, str]:
    """Return the version of each peer, or why it is absent."""
    return {peer: find(peer)[1] for peer in HOMES}


def is_absent(peer: str) -> bool:
    """Whether a peer is missing here; the empty name means bnfreeze or torch."""
    return bool(peer) and find(peer)[0] is None


def torchvision_layers(model: nn.Module) -> None:
    """Replace each layer by torchvision's, as `resnet50(norm_layer=...)` does."""

    def convert(live: nn.BatchNorm2d) -> nn.Module:
        frozen = find("torchvision")[0](live.num_features, live.eps)
        frozen.load_state_dict(live.state_dict())
        return frozen.to(live.running_mean.device)

    replace(model, convert)


def timm_layers(model: nn.Module) -> None:
    """Freeze with timm, whose frozen BatchNorm2d is torchvision's class."""
    find("timm")[0](model)


def transformers_layers(model: nn.Module) -> None:
    """Freeze with the function that Transformers' DETR uses for its backbone."""
    with torch.no_grad():
        find("transformers")[0](model)


def mmengine_convolutions(model: nn.Module) -> None:
    """Let MMEngine scale the weights of the convolutions. The norm layers must be in eval mode."""
    holder = nn.Module()  # the function asks for a model and the name of a part of it
    holder.model = model
    find("mmengine")[0](holder, "model")


def replace(model: nn.Module, convert: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    """Replace each plain batch norm layer."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, convert(child))
