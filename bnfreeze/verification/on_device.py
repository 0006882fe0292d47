"""Live tensors compared on the device where they are, with one answer for all of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["unequal_tensors"]

Pair = tuple[Tensor, Tensor]

# On the CPU the C library compares memory several times as fast as torch.equal does.
_memcmp = (ctypes.CDLL(None) if os.name == "posix" else ctypes.CDLL("msvcrt")).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int
# Tensors up to this many bytes are compared together on an accelerator, where each launch costs.
_SMALL = 1 << 20


def unequal_tensors(pairs: Mapping[str, Pair]) -> set[str]:
    """The names of the pairs whose bits differ.

    On the CPU each pair is compared alone. An accelerator gives one answer for all its pairs, so
    that it is waited for once; only if something differs are they compared one by one.

    Args:
        pairs: plain contiguous tensors, two and two of the same dtype and shape, by name.
    """
    found = set()
    elsewhere: dict[torch.device, dict[str, Pair]] = {}
    for name, (old, new) in pairs.items():
        before = old if old.device == new.device else old.to(new.device)
        if not _on_cpu(new):
            elsewhere.setdefault(new.device, {})[name] = _octets(before), _octets(new)
        elif new.nbytes and _memcmp(before.data_ptr(), new.data_ptr(), new.nbytes):
            found.add(name)
    for group in elsewhere.values():
        if _any_differs(list(group.values())):
            found |= {name for name, pair in group.items() if not torch.equal(*pair)}
    return found


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _any_differs(pairs: Sequence[Pair]) -> bool:
    """The answer for all pairs on one device."""
    jobs = [pair for pair in pairs if pair[0].numel() > _SMALL]
    if small := [pair for pair in pairs if pair[0].numel() <= _SMALL]:
        before, after = map(torch.cat, zip(*small, strict=True))
        jobs.append((before, after))
    return bool(torch.stack([torch.ne(old, new).any() for old, new in jobs]).any())


def _octets(tensor: Tensor) -> Tensor:
    """The tensor as flat bytes."""
    return tensor.reshape(-1).view(torch.uint8)
