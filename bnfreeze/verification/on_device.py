"""Live tensors compared on the device where they are, with one answer for all of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["SameBits", "unequal_tensors"]

Pair = tuple[Tensor, Tensor]

# On the CPU the C library compares memory several times as fast as torch.equal does.
_memcmp = (ctypes.CDLL(None) if os.name == "posix" else ctypes.CDLL("msvcrt")).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int
# Tensors up to this many bytes are compared together on an accelerator, where each launch costs.
_SMALL = 1 << 20


class SameBits:
    """Whether two and two tensors have the same bits; can be asked again after writes to them.

    An accelerator gives one answer for all its pairs, so that it is waited for once.
    """

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        """Take plain contiguous tensors, two and two of the same dtype and shape, by name."""
        self._kept = dict(pairs)  # the memory behind the addresses
        self._here: list[tuple[int, int, int]] = []
        small: dict[torch.device, list[Pair]] = {}
        self._there: dict[torch.device, list[tuple[Tensor, list[Tensor]]]] = {}
        for old, new in pairs.values():
            if _on_cpu(new) and _on_cpu(old):
                self._here.append((old.data_ptr(), new.data_ptr(), new.nbytes))
                continue
            pair = _octets(old.to(new.device)), _octets(new)
            if new.nbytes <= _SMALL:
                small.setdefault(new.device, []).append(pair)
            else:
                self._there.setdefault(new.device, []).append((pair[0], [pair[1]]))
        for device, group in small.items():
            before, after = zip(*group, strict=True)
            self._there.setdefault(device, []).append((torch.cat(before), list(after)))

    def __bool__(self) -> bool:
        return not any(size and _memcmp(old, new, size) for old, new, size in self._here) and all(
            not torch.stack([_differs(*job) for job in jobs]).any() for jobs in self._there.values()
        )


def unequal_tensors(pairs: Mapping[str, Pair]) -> set[str]:
    """The names of the pairs whose bits differ; the pairs are as for `SameBits`."""
    if SameBits(pairs):
        return set()
    return {name for name, pair in pairs.items() if not SameBits({name: pair})}


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _differs(before: Tensor, after: list[Tensor]) -> Tensor:
    return torch.ne(before, after[0] if len(after) == 1 else torch.cat(after)).any()


def _octets(tensor: Tensor) -> Tensor:
    """The tensor as flat bytes."""
    return tensor.reshape(-1).view(torch.uint8)
