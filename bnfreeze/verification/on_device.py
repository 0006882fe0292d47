"""Live tensors compared on the device where they are, with one small transfer for all of them."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["PendingCheck", "unequal_tensors"]

# On the CPU the C library compares memory twice as fast as torch.equal compares even int64.
_memcmp = (ctypes.CDLL(None) if os.name == "posix" else ctypes.CDLL("msvcrt")).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int

# An accelerator compares up to eight bytes at a time.
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
# Tensors up to this many bytes are compared together on an accelerator, where each launch costs.
_SMALL = 1 << 20


class PendingCheck:
    """An accelerator's answer that is read one check later, so that no check waits for the device.

    `launch` is the first half, `differed` the second. Tensors on the CPU do not need it.
    """

    def __init__(self) -> None:
        # The optimizer steps completed at the launch, and at the last check that was clean.
        self.step = self.since = 0
        self._read: Callable[[], bool] = lambda: False

    def launch(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start comparing. An earlier launch is forgotten."""
        self._read = _start(pairs)

    def differed(self) -> bool:
        """Whether any pair of the last launch differed. Waits for a device that still works."""
        read, self._read = self._read, lambda: False
        return read()


def unequal_tensors(
    pairs: Sequence[tuple[Tensor, Tensor]], pending: PendingCheck | None = None
) -> list[int]:
    """The indices of the pairs whose bits differ.

    Args:
        pairs: plain contiguous tensors, two and two of the same dtype and shape.
        pending: takes the pairs on an accelerator, which are then not in the answer.

    On the CPU each pair is compared alone. On an accelerator one answer is read for all pairs;
    only if something differs are they compared one by one.
    """
    found = []
    elsewhere: list[int] = []
    pairs = [(old if old.device == new.device else old.to(new.device), new) for old, new in pairs]
    for index, (before, after) in enumerate(pairs):
        if not _on_cpu(before):
            elsewhere.append(index)
        elif before.nbytes and _memcmp(before.data_ptr(), after.data_ptr(), before.nbytes):
            found.append(index)
    if pending is not None:
        pending.launch([pairs[index] for index in elsewhere])
    elif _start([pairs[index] for index in elsewhere])():
        found += [i for i in elsewhere if not torch.equal(*_words(*pairs[i]))]
    return sorted(found)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _start(pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], bool]:
    """Ask whether any pair differs; the answer is one small transfer for each device."""
    jobs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    small: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for before, after in pairs:
        where = small if before.nbytes <= _SMALL else jobs
        flat = before.reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8)
        where.setdefault(before.device, []).append(flat)
    for device, group in small.items():
        joined = torch.cat([pair[0] for pair in group]), torch.cat([pair[1] for pair in group])
        jobs.setdefault(device, []).append(joined)
    answers = []
    for job in jobs.values():
        differing = [torch.ne(*_words(before, after)).any() for before, after in job]
        answers.append(_on_its_way(torch.stack(differing).any()))
    return lambda: any(answer() for answer in answers)


def _on_its_way(verdict: Tensor) -> Callable[[], bool]:
    """Start copying an answer to the host; reading it waits until it is there."""
    if verdict.device.type != "cuda":
        return lambda: bool(verdict)
    # A copy stops the host unless it goes to pinned memory.
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(verdict, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(verdict.device))

    def answer() -> bool:
        arrived.synchronize()
        return bool(host)

    return answer


def _words(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both as flat integers, as wide as size and alignment of both allow."""
    size = first.element_size()
    # The word must divide the length, and the place in their storage where both begin.
    lengths = first.nbytes, first.storage_offset() * size, second.storage_offset() * size
    unit = math.gcd(*lengths, 8)
    word = next(word for word in _WORDS if unit % word.itemsize == 0)
    return first.reshape(-1).view(word), second.reshape(-1).view(word)
