"""One tensor's bits: read, compared, the difference located, digested."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, UninitializedBuffer, UninitializedParameter

from bnfreeze.torch_private import DisableTorchFunctionSubclass

__all__ = [
    "Difference",
    "Later",
    "Scalar",
    "digest",
    "locate",
    "read",
    "shard",
    "unequal",
    "why_unreadable",
]

Scalar = bool | int | float | complex | str

# On the CPU the C library compares memory twice as fast as torch.equal compares even int64.
_memcmp = (ctypes.CDLL(None) if os.name == "posix" else ctypes.CDLL("msvcrt")).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int

# On an accelerator, eight bytes at a time.
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
# Tensors up to this size are compared in one go on an accelerator, where each launch costs.
_SMALL = 1 << 20


def why_unreadable(tensor: Tensor) -> str:
    """Why the tensor's bits cannot be read; empty if they can."""
    if type(tensor) not in (Tensor, Parameter):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            return "it has not seen an input yet"
        own = shard(tensor)
        if own is not None:
            return why_unreadable(own)
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"{type(tensor).__name__} keeps its values in a way of its own"
    if tensor.is_meta:
        return "it is on the meta device and has no values"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"its layout is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return "it is quantised"
    if tensor.numel() and not tensor.untyped_storage().size():
        return "its storage has been freed"
    return ""


def shard(tensor: Tensor) -> Tensor | None:
    """This rank's shard of a DTensor; None of any other tensor."""
    # Where nobody has imported it, there is none; not every torch is built with it.
    home = sys.modules.get("torch.distributed.tensor")
    if home is None or not isinstance(tensor, home.DTensor):
        return None
    return cast("Tensor", tensor._local_tensor)


def read(tensor: Tensor) -> Tensor:
    """The values as a plain contiguous tensor, of the same memory where that is possible.

    Of a DTensor, this rank's shard. Only for what `why_unreadable` says nothing of.
    """
    own = shard(tensor)
    with DisableTorchFunctionSubclass():
        plain = (tensor if own is None else own).detach()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        return plain.contiguous()


class Later:
    """An accelerator's verdict, read one check later, so that no check waits for the device.

    `launch` is the first half, `differed` the second. Tensors on the CPU need none of it.
    """

    def __init__(self) -> None:
        # The optimizer steps completed when it was asked for, and when all was last seen well.
        self.step = self.since = 0
        self._read: Callable[[], bool] = lambda: False

    def launch(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start comparing; what was asked before is forgotten."""
        self._read = _start(pairs)

    def differed(self) -> bool:
        """Whether any pair of the last launch differed; a device still at work is waited for."""
        read, self._read = self._read, lambda: False
        return read()


def unequal(pairs: Sequence[tuple[Tensor, Tensor]], later: Later | None = None) -> list[int]:
    """The indices of the pairs whose bits differ.

    Args:
        pairs: what `read` gave, two and two of the same dtype, shape and device.
        later: takes the pairs on an accelerator, which are then not among the answer.

    On the CPU each pair is compared by itself. On an accelerator there is one verdict for all,
    and so one transfer; only where something differs are the pairs looked at one by one.
    """
    found = []
    elsewhere: list[int] = []
    for index, (before, after) in enumerate(pairs):
        if not _is_here(before):
            elsewhere.append(index)
        elif before.nbytes and _memcmp(before.data_ptr(), after.data_ptr(), before.nbytes):
            found.append(index)
    if later is not None:
        later.launch([pairs[index] for index in elsewhere])
    elif _start([pairs[index] for index in elsewhere])():
        found += [i for i in elsewhere if not torch.equal(*_words(*pairs[i]))]
    return sorted(found)


def _is_here(tensor: Tensor) -> bool:
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
    """Begin to copy a verdict to the host; the answer waits until it is there."""
    if verdict.device.type != "cuda":
        return lambda: bool(verdict)
    # Only pinned memory is copied to without stopping the host.
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
    # What has to be a multiple of the word: the length, and where in their storage both begin.
    lengths = first.nbytes, first.storage_offset() * size, second.storage_offset() * size
    unit = math.gcd(*lengths, 8)
    word = next(word for word in _WORDS if unit % word.itemsize == 0)
    return first.reshape(-1).view(word), second.reshape(-1).view(word)


@dataclass(frozen=True)
class Difference:
    """Where and by how much two tensors of one dtype and shape differ.

    Attributes:
        changed: how many elements differ in any bit.
        first_index: of the first of them, in row-major order; ``()`` in a 0-dimensional tensor.
        before: its value in the one.
        after: its value in the other. Where both look alike (two NaN), they come with their bits.
        max_abs: the largest absolute change; None where no change is a number.
    """

    changed: int
    first_index: tuple[int, ...]
    before: Scalar
    after: Scalar
    max_abs: float | None


def locate(before: Tensor, after: Tensor) -> Difference | None:
    """The difference between what `read` gave twice, or None where all bits are equal."""
    before, after = before.cpu(), after.cpu()
    size = before.element_size()
    old, new = (t.reshape(-1).view(torch.uint8).reshape(-1, size) for t in (before, after))
    places = torch.ne(old, new).any(dim=1).nonzero().reshape(-1)
    if not len(places):
        return None
    first = int(places[0])
    return Difference(
        changed=len(places),
        first_index=_unravel(first, tuple(before.shape)),
        before=_scalar(before, old, new, first),
        after=_scalar(after, new, old, first),
        max_abs=_largest(before.reshape(-1)[places], after.reshape(-1)[places]),
    )


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.append(rest)
    return tuple(reversed(index))


def _scalar(tensor: Tensor, own: Tensor, other: Tensor, flat: int) -> Scalar:
    """One element, as a number; with its bits where the other's number would look the same."""
    word = "0x" + bytes(own[flat].tolist()[::-1]).hex()
    try:
        value: Scalar = tensor.reshape(-1)[flat].item()
        twin = other[flat].clone().view(tensor.dtype)[0].item()
    except (RuntimeError, NotImplementedError):  # a dtype that has no numbers of its own
        return word
    return f"{value} ({word})" if repr(value) == repr(twin) else value


def _largest(before: Tensor, after: Tensor) -> float | None:
    try:
        if before.is_complex():
            change = (after.to(torch.complex128) - before.to(torch.complex128)).abs()
        elif before.is_floating_point():
            change = (after.double() - before.double()).abs()
        else:  # exact, where a float64 would round the difference of two large counts
            pairs = zip(before.tolist(), after.tolist(), strict=True)
            return float(max(abs(int(new) - int(old)) for old, new in pairs))
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    numbers = change[~change.isnan()]
    return float(numbers.max()) if len(numbers) else None


def digest(name: str, tensor: Tensor) -> str:
    """The SHA-256 of name, dtype, shape and bytes, each with its length before it, as hex.

    Args:
        name: the dotted name.
        tensor: what `read` gave.
    """
    shape = ",".join(map(str, tensor.shape))
    hashed = hashlib.sha256()
    for text in (name, str(tensor.dtype), shape):
        part = text.encode()
        hashed.update(len(part).to_bytes(8, "little") + part)
    hashed.update(tensor.nbytes.to_bytes(8, "little"))
    if tensor.nbytes:
        here = tensor.cpu()
        # The bytes where they lie: no copy, and no numpy, which torch does not depend on.
        hashed.update((ctypes.c_ubyte * here.nbytes).from_address(here.data_ptr()))
    return hashed.hexdigest()
