"""The values of two tensors: do their bits differ, where, and by how much. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnfreeze.checkpoints.stored_tensor import StoredTensor, Words, decoded
from bnfreeze.errors import CheckpointError

if TYPE_CHECKING:
    from bnfreeze.verification.on_device import PendingCheck

__all__ = ["Difference", "KeptTensor", "Scalar", "digest", "locate", "unequal"]

Scalar = bool | int | float | complex | str


class KeptTensor(StoredTensor):
    """A tensor whose elements are kept in memory, as words."""

    def __init__(self, dtype: str, shape: tuple[int, ...], words: Words) -> None:
        self.dtype, self.shape, self._words = dtype, shape, words

    def storage(self) -> tuple[object, int]:
        """The tensor itself, and its bytes."""
        return self, self._words.nbytes

    def words(self) -> Words:
        """All elements in row-major order, as unsigned integers."""
        return self._words


@dataclass(frozen=True)
class Difference:
    """Where and by how much two tensors of one dtype and shape differ.

    Attributes:
        changed: how many elements differ in any bit.
        first_index: the index of the first of them, in row-major order; ``()`` for a
            0-dimensional tensor.
        before: its value in the first tensor.
        after: its value in the second. If both look alike (two NaN), they come with their bits.
        max_abs: the largest absolute change; None if no change is a finite number.
        max_ulps: the largest change of a floating point number, in units of its last place; None
            for other dtypes, and if a sign or an infinity changed.
    """

    changed: int
    first_index: tuple[int, ...]
    before: Scalar
    after: Scalar
    max_abs: float | None
    max_ulps: int | None


def unequal(
    names: Sequence[str],
    pairs: Sequence[tuple[StoredTensor, StoredTensor]],
    pending: PendingCheck | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, Difference]:
    """The pairs whose bits differ, by their index.

    Args:
        names: a name for each pair, for errors.
        pairs: two and two of the same dtype and shape.
        pending: takes the pairs on an accelerator, which are then not in the answer.
        progress: is called with how many of the stored pairs are compared, and of how many.

    Live tensors are compared on their own device; only what differs there is read from it.

    Raises:
        CheckpointError: a stored tensor cannot be read.
    """
    tensors = {
        index: (before.tensor, after.tensor)
        for index, (before, after) in enumerate(pairs)
        if hasattr(before, "tensor") and hasattr(after, "tensor")
    }
    left = [index for index in range(len(pairs)) if index not in tensors]
    if tensors:
        from bnfreeze.verification.on_device import unequal_tensors

        live = list(tensors)
        left += [live[index] for index in unequal_tensors(list(tensors.values()), pending)]
    found = {}
    for done, index in enumerate(left):
        progress(done, len(left))
        try:
            difference = locate(*pairs[index])
        except CheckpointError as error:
            raise type(error)(f"{names[index]}: {error}") from None
        if difference is not None:
            found[index] = difference
    return found


def locate(before: StoredTensor, after: StoredTensor) -> Difference | None:
    """The difference between two tensors of one dtype and shape; None if all bits are equal.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    changed = passed = 0
    first: tuple[int, Words, Words] | None = None
    largest: list[float] = []
    ulps: list[int | None] = []
    # A complex128 has two words.
    pair = 2 if before.dtype == "complex128" else 1
    for old, new in zip(before.pieces(), after.pieces(), strict=True):
        places = np.flatnonzero((old != new).reshape(-1, pair).any(axis=1))
        if len(places):
            was, now = old.reshape(-1, pair)[places], new.reshape(-1, pair)[places]
            first = first or (passed + int(places[0]), was[0], now[0])
            changed += len(places)
            was, now = was.reshape(-1), now.reshape(-1)
            largest += _largest(was, now, before.dtype)
            ulps.append(_ulps(was, now, before.dtype))
        passed += len(old) // pair
    if first is None:
        return None
    values = [_scalar(words, before.dtype) for words in first[1:]]
    if repr(values[0]) == repr(values[1]):
        values = [
            f"{value} ({_bits(words)})" for value, words in zip(values, first[1:], strict=True)
        ]
    return Difference(
        changed=changed,
        first_index=tuple(map(int, np.unravel_index(first[0], before.shape))),
        before=values[0],
        after=values[1],
        max_abs=max(largest, default=None),
        max_ulps=None if None in ulps else max(filter(None, ulps), default=0),
    )


def _bits(words: Words) -> str:
    return "0x" + words.tobytes()[::-1].hex()


def _scalar(words: Words, dtype: str) -> Scalar:
    values = decoded(words, dtype)
    # numpy has no such dtype: the bits are all there is to show
    scalar: Scalar = _bits(words) if values is None else values.item()
    return scalar


def _largest(before: Words, after: Words, dtype: str) -> list[float]:
    """The largest absolute change as far as there is a finite one, in a list of at most one."""
    old, new = decoded(before, dtype), decoded(after, dtype)
    if old is None or new is None:
        return []
    if old.dtype.kind in "iu":  # exact; a float64 would round the difference of two large counts
        counts = zip(old.tolist(), new.tolist(), strict=True)
        return [float(max(abs(y - x) for x, y in counts))]
    wide = np.complex128 if old.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        change = abs(new.astype(wide) - old.astype(wide))
    change = change[np.isfinite(change)]
    return [float(change.max())] if len(change) else []


def _ulps(before: Words, after: Words, dtype: str) -> int | None:
    """The largest change in units of the last place, if no sign and no infinity is involved."""
    if dtype not in ("float64", "float32", "float16", "bfloat16"):
        return None
    old, new = decoded(before, dtype), decoded(after, dtype)
    if old is None or new is None or not (np.isfinite(old).all() and np.isfinite(new).all()):
        return None
    # Floating point numbers of one sign are ordered as their bits are.
    if (np.signbit(old) != np.signbit(new)).any():
        return None
    return int((np.maximum(before, after) - np.minimum(before, after)).max())


def digest(name: str, tensor: StoredTensor) -> str:
    """The SHA-256 of name, dtype, shape and bytes, each with its length before it, as hex.

    Args:
        name: the dotted name.
        tensor: a tensor with values.

    Raises:
        CheckpointError: it cannot be read.
    """
    shape = ",".join(map(str, tensor.shape))
    hashed = hashlib.sha256()
    for text in (name, tensor.dtype, shape):
        part = text.encode()
        hashed.update(len(part).to_bytes(8, "little") + part)
    words = 2 if tensor.dtype == "complex128" else 1
    for number, piece in enumerate(tensor.pieces()):
        if not number:
            hashed.update((tensor.numel * words * piece.itemsize).to_bytes(8, "little"))
        hashed.update(piece.data)
    if not tensor.numel:
        hashed.update(bytes(8))
    return hashed.hexdigest()
