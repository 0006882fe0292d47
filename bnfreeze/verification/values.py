"""The values of two tensors: do their bits differ, where, and by how much. Needs no torch."""

from __future__ import annotations

import hashlib

import numpy as np

from bnfreeze.checkpoints.stored_tensor import ITEM_SIZES, StoredTensor, Words, decoded
from bnfreeze.verification.drift import Drift, Scalar


class KeptTensor(StoredTensor):
    """A tensor whose elements are kept in memory, as words."""

    def __init__(self, dtype: str, shape: tuple[int, ...], words: Words) -> None:
        self.dtype, self.shape, self._words = dtype, shape, words

    def words(self) -> Words:
        """All elements in row-major order, as unsigned integers."""
        return self._words


def locate(name: str, before: StoredTensor, after: StoredTensor) -> Drift | None:
    """How two tensors of one dtype and shape differ; None if all bits are equal.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    changed = passed = 0
    first: tuple[int, Words, Words] | None = None
    sizes: list[tuple[float | None, int | None]] = []
    # A complex128 has two words.
    pair = 2 if before.dtype == "complex128" else 1
    for old, new in zip(before.pieces(), after.pieces(), strict=True):
        places = np.flatnonzero((old != new).reshape(-1, pair).any(axis=1))
        if len(places):
            was, now = old.reshape(-1, pair)[places], new.reshape(-1, pair)[places]
            first = first or (passed + int(places[0]), was[0], now[0])
            changed += len(places)
            sizes.append(_sizes(was.reshape(-1), now.reshape(-1), before.dtype))
        passed += len(old) // pair
    if first is None:
        return None
    largest, ulps = zip(*sizes, strict=True)
    values: list[Scalar] = [
        # Where numpy has no such dtype, the bits are all there is to show.
        _bits(words) if (known := decoded(words, before.dtype)) is None else known.item()
        for words in first[1:]
    ]
    if repr(values[0]) == repr(values[1]):
        values = [f"{values[0]} ({_bits(words)})" for words in first[1:]]
    return Drift(
        name,
        "value",
        changed=changed,
        total=before.numel,
        first_index=tuple(map(int, np.unravel_index(first[0], before.shape))),
        before=values[0],
        after=values[1],
        max_abs=max((size for size in largest if size is not None), default=None),
        max_ulps=None if None in ulps else max(filter(None, ulps), default=0),
    )


def _bits(words: Words) -> str:
    return "0x" + words.tobytes()[::-1].hex()


def _sizes(before: Words, after: Words, dtype: str) -> tuple[float | None, int | None]:
    """The largest change: absolute, if there is a finite one; and in units of the last place.

    The second is known of floating point numbers alone, if no sign and no infinity is involved.
    """
    old, new = decoded(before, dtype), decoded(after, dtype)
    if old is None or new is None:
        return None, None
    if old.dtype.kind in "iu":  # exact; a float64 would round the difference of two large counts
        pairs = zip(old.tolist(), new.tolist(), strict=True)
        return float(max(abs(y - x) for x, y in pairs)), None
    wide = np.complex128 if old.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        change = abs(new.astype(wide) - old.astype(wide))
    finite, ulps = change[np.isfinite(change)], None
    # Floating point numbers of one sign are ordered as their bits are.
    if (
        old.dtype.kind == "f"
        and len(finite) == len(change)
        and (np.signbit(old) == np.signbit(new)).all()
    ):
        ulps = int((np.maximum(before, after) - np.minimum(before, after)).max())
    return (float(finite.max()) if len(finite) else None), ulps


def sha256(name: str, tensor: StoredTensor) -> str:
    """The SHA-256 of name, dtype, shape and bytes, each with its length before it, as hex.

    Raises:
        CheckpointError: the tensor cannot be read.
    """
    hashed = hashlib.sha256()
    for text in (name, tensor.dtype, ",".join(map(str, tensor.shape))):
        part = text.encode()
        hashed.update(len(part).to_bytes(8, "little") + part)
    hashed.update((tensor.numel * ITEM_SIZES.get(tensor.dtype, 1)).to_bytes(8, "little"))
    for piece in tensor.pieces():
        hashed.update(piece.data)
    return hashed.hexdigest()
