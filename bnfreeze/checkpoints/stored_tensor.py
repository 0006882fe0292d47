"""Tensors as they lie in a file: described, checked, and read only when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bnfreeze.checkpoints.limits import checked_shape, is_size
from bnfreeze.checkpoints.source import Source
from bnfreeze.errors import (
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
    damaged,
)

# A flat array of unsigned integers, little-endian, one for each element (two for complex128):
# what is compared bit by bit.
Words = NDArray[Any]

# Elements to a piece: a weight of any size is compared with this much of it in memory.
_PIECE: Final = 1 << 20

# The bytes of an element, by torch's name of the dtype.
ITEM_SIZES: Final[dict[str, int]] = {
    dtype: size
    for size, dtypes in {
        16: "complex128",
        8: "float64 int64 uint64 complex64",
        4: "float32 int32 uint32 complex32 qint32",
        2: "float16 bfloat16 int16 uint16",
        1: "int8 uint8 bool qint8 quint8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 "
        "float8_e5m2fnuz float8_e8m0fnu",
    }.items()
    for dtype in dtypes.split()
}

NUMPY_DTYPES: Final = frozenset(
    name for name in ITEM_SIZES if not name.startswith(("float8", "complex32", "q", "bfloat16"))
)


def numbered(dtypes: str, first: int) -> dict[int, str]:
    """A format's numbers for dtypes, which follow one another from the first."""
    return dict(enumerate(dtypes.split(), first))


def decoded(words: Words, dtype: str) -> NDArray[Any] | None:
    """The values that words of a dtype stand for; None where numpy has no such dtype."""
    if dtype == "bfloat16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    if dtype == "bool":
        return np.not_equal(words, 0)  # any byte but 0 is true, as torch has it
    return words.view(np.dtype(dtype).newbyteorder("<")) if dtype in NUMPY_DTYPES else None


class StoredTensor:
    """A tensor's description, and its bytes on demand.

    Attributes:
        dtype: torch's name of it, such as ``"float32"``.
        shape: the sizes.
        why: why there is no more than the description; empty where there is.
        address: the device and address of a live tensor; None of one in a file.
    """

    dtype: str
    shape: tuple[int, ...]
    why: str = ""
    address: tuple[object, int] | None = None

    @property
    def has_values(self) -> bool:
        """Whether there is more than the description."""
        return not self.why

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def storage(self) -> tuple[object, int]:
        """What identifies the storage it lies in, and that storage's bytes."""
        return self, self.numel * ITEM_SIZES.get(self.dtype, 1) if self.has_values else 0

    def words(self) -> Words:
        """All elements in row-major order, as unsigned integers.

        Raises:
            CheckpointError: they cannot be read.
        """
        raise UnsupportedFormatError(f"A tensor cannot be read: {self.why}.")

    def pieces(self) -> Iterator[Words]:
        """As `words`, in pieces that are as long for every tensor."""
        words = self.words()
        length = _PIECE * (2 if self.dtype == "complex128" else 1)
        for start in range(0, len(words), length):
            yield words[start : start + length]

    def values(self) -> NDArray[Any] | None:
        """All elements in row-major order; None where numpy has no such dtype."""
        return decoded(self.words(), self.dtype)

    def item(self) -> int | float | None:
        """The value of a tensor with one element; None of any other."""
        values = self.values() if self.numel == 1 and self.has_values else None
        return None if values is None or values.dtype.kind == "c" else values.item()


@dataclass(frozen=True, eq=False)
class DescribedTensor(StoredTensor):
    """A tensor of which the description is read, and not the values."""

    dtype: str
    shape: tuple[int, ...]
    why: str


@dataclass(frozen=True, eq=False)
class StridedTensor(StoredTensor):
    """A view of a storage. Making one checks that all of it lies inside.

    Attributes:
        stride: in elements, as torch has it.
        source: the storage's bytes.
        offset: of the first element, in elements.
        is_swapped: whether the numbers are big-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    source: Source
    offset: int = 0
    is_swapped: bool = False

    def __post_init__(self) -> None:
        sizes, places = checked_shape(self.shape), (*self.stride, self.offset)
        if len(sizes) != len(self.stride) or not all(map(is_size, places)):
            raise damaged("a tensor whose shape, stride and offset do not make sense.")
        end = (self.offset + self._span) * ITEM_SIZES[self.dtype]
        if self.numel and end > self.source.size:
            raise CorruptCheckpointError(
                f"A tensor of shape {shown(self.shape)} reaches to byte {end:,} of its storage, "
                f"which has {self.source.size:,}."
            )

    @property
    def _span(self) -> int:
        """How many elements lie between the first and the last, both included."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True) if n)

    @property
    def _contiguous(self) -> bool:
        packed = _packed_strides(self.shape)
        steps = zip(self.shape, self.stride, packed, strict=True)
        return all(size == 1 or step == expected for size, step, expected in steps)

    def storage(self) -> tuple[object, int]:
        """The source and its bytes."""
        return self.source, self.source.size

    def words(self) -> Words:
        """All elements in row-major order, as unsigned integers.

        Raises:
            UnsafeCheckpointError: few bytes are claimed to be many elements, or the elements are
                strewn over many more bytes than they are.
        """
        if not self.numel:
            return self._read(0, 0)
        # Whatever is read or built here stays within a small multiple of bytes that are there.
        if self.numel > max(self._span, 1 << 20):
            raise UnsafeCheckpointError(
                f"Refused: a tensor of shape {shown(self.shape)} repeats {self._span:,} stored "
                f"elements {self.numel:,} times over."
            )
        if self._span > max(8 * self.numel, 1 << 12):
            raise UnsafeCheckpointError(
                f"Refused: {self.numel:,} elements of a tensor are strewn over {self._span:,}."
            )
        words = self._read(0, self._span)
        if self._contiguous:
            return words
        # Of complex128 an element is two words.
        size = ITEM_SIZES[self.dtype]
        # Of a single place the step may be anything, and is not taken.
        steps = [size * (n > 1 and step) for n, step in zip(self.shape, self.stride, strict=True)]
        view = np.ndarray(self.shape, f"V{size}", words, strides=steps)
        return np.ascontiguousarray(view).reshape(-1).view(words.dtype)

    def pieces(self) -> Iterator[Words]:
        """As `words`, in pieces; of a contiguous tensor never more than one is in memory."""
        if not self._contiguous or self.numel <= _PIECE:
            yield from super().pieces()
            return
        for start in range(0, self.numel, _PIECE):
            yield self._read(start, min(_PIECE, self.numel - start))

    def _read(self, start: int, count: int) -> Words:
        size = ITEM_SIZES[self.dtype]
        data = self.source.read((self.offset + start) * size, count * size) if count else b""
        # The halves of a complex number are swapped each by itself.
        half = size // 2 if self.dtype.startswith("complex") else size
        words = np.frombuffer(data, f"{'>' if self.is_swapped else '<'}u{half}")
        return words.astype(f"<u{half}", copy=False).view(f"<u{min(size, 8)}")


def packed_tensor(
    dtype: str, shape: Any, source: Source, *, is_swapped: bool = False, is_fortran: bool = False
) -> StridedTensor:
    """A tensor whose elements fill its source, in row-major order or in Fortran's.

    Raises:
        CorruptCheckpointError: the shape is none, or does not fit the bytes.
    """
    sizes = checked_shape(shape)
    count = math.prod(sizes)
    if count * ITEM_SIZES[dtype] != source.size:
        raise damaged(
            f"a tensor of {count:,} elements of {dtype} is said to lie in {source.size:,} bytes."
        )
    stride = _packed_strides(sizes[::-1])[::-1] if is_fortran else _packed_strides(sizes)
    return StridedTensor(dtype, sizes, stride, source, is_swapped=is_swapped)


def _packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of elements that lie in row-major order."""
    return tuple(math.prod(shape[axis:]) for axis in range(1, len(shape) + 1))


def check_claims(tensors: Iterable[StoredTensor]) -> None:
    """Refuse what would have the same bytes read again and again.

    Raises:
        UnsafeCheckpointError: the tensors claim far more bytes than their storages have.
    """
    readable = [tensor for tensor in tensors if tensor.has_values]
    claimed = sum(tensor.numel * ITEM_SIZES.get(tensor.dtype, 1) for tensor in readable)
    there = sum(dict(tensor.storage() for tensor in readable).values())
    if claimed > 16 * there + (1 << 30):
        raise UnsafeCheckpointError(
            f"Refused: its tensors claim {claimed:,} bytes, and their storages have {there:,}."
        )


def shown(shape: tuple[int, ...]) -> str:
    """The shape as text, as ``64×3×7×7``; of many dimensions the first."""
    text = "×".join(map(str, shape[:6])) or "()"
    return text if len(shape) <= 6 else f"{text}×…"
