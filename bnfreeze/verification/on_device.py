"""Live tensors compared on the device where they are, with one answer for all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

__all__ = ["unequal_tensors"]

Pair = tuple[Tensor, Tensor]

# Tensors up to this many bytes are compared together on an accelerator, where each launch costs.
_SMALL = 1 << 20


def unequal_tensors(pairs: Mapping[str, Pair]) -> set[str]:
    """The names of the pairs whose bits differ.

    On the CPU each pair is compared alone. An accelerator gives one answer for all its pairs, so
    that it is waited for once; only if something differs are they compared one by one.

    Args:
        pairs: plain contiguous tensors, two and two of the same dtype and shape, by name.
    """
    by_device: dict[torch.device, dict[str, Pair]] = {}
    for name, (old, new) in pairs.items():
        pair = _octets(old.to(new.device)), _octets(new)
        by_device.setdefault(new.device, {})[name] = pair
    return {
        name
        for device, group in by_device.items()
        if _on_cpu(device) or _any_differs(group.values())
        for name, pair in group.items()
        if not torch.equal(*pair)
    }


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _any_differs(pairs: Collection[Pair]) -> bool:
    """The answer for all pairs on one device."""
    jobs = [pair for pair in pairs if pair[0].numel() > _SMALL]
    if small := [pair for pair in pairs if pair[0].numel() <= _SMALL]:
        before, after = map(torch.cat, zip(*small, strict=True))
        jobs.append((before, after))
    return bool(torch.stack([torch.ne(old, new).any() for old, new in jobs]).any())


def _octets(tensor: Tensor) -> Tensor:
    """The tensor as flat bytes."""
    return tensor.reshape(-1).view(torch.uint8)
