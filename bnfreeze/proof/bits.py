"""One tensor's bits: read, compared, the difference located, digested."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import Parameter, UninitializedBuffer, UninitializedParameter

__all__ = ["Difference", "Scalar", "digest", "locate", "read", "unequal", "why_unreadable"]

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
        if isinstance(tensor, DTensor):
            return why_unreadable(tensor._local_tensor)
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


def read(tensor: Tensor) -> Tensor:
    """The values as a plain contiguous tensor, of the same memory where that is possible.

    Of a DTensor, this rank's shard. Only for what `why_unreadable` says nothing of.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        plain = tensor.detach()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        return plain.contiguous()


def unequal(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """The indices of the pairs whose bits differ.

    Args:
        pairs: what `read` gave, two and two of the same dtype, shape and device.

    On the CPU each pair is compared by itself. On an accelerator there is one verdict for all,
    and so one transfer; only where something differs are the pairs looked at one by one.
    """
    found = []
    elsewhere: list[int] = []
    for index, (before, after) in enumerate(pairs):
        if before.device.type != "cpu":
            elsewhere.append(index)
        elif before.nbytes and _memcmp(before.data_ptr(), after.data_ptr(), before.nbytes):
            found.append(index)
    if elsewhere and _any_unequal([pairs[index] for index in elsewhere]):
        found += [i for i in elsewhere if not torch.equal(*_words(*pairs[i]))]
    return sorted(found)


def _any_unequal(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether any pair differs, with one transfer for each device."""
    jobs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    small: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for before, after in pairs:
        where = small if before.nbytes <= _SMALL else jobs
        flat = before.reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8)
        where.setdefault(before.device, []).append(flat)
    for device, group in small.items():
        joined = torch.cat([pair[0] for pair in group]), torch.cat([pair[1] for pair in group])
        jobs.setdefault(device, []).append(joined)
    verdicts = []
    for job in jobs.values():
        differing = [torch.ne(*_words(before, after)).any() for before, after in job]
        verdicts.append(torch.stack(differing).any())
    return any(bool(verdict) for verdict in verdicts)


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
