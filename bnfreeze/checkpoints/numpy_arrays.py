"""NumPy's arrays, scalars and dtypes in a pickle, described as data."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from bnfreeze.checkpoints.limits import MAX_DIMENSIONS, check_limit, is_shape
from bnfreeze.checkpoints.pickled import Opaque, Stateful
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import (
    ITEM_SIZES,
    NUMPY_DTYPES,
    Record,
    StoredTensor,
    StridedTensor,
    Words,
)
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError

__all__ = ["NUMPY_BUILDERS", "PickledArray", "numpy_dtype", "strided_array"]

_LONGEST_TEXT: Final = 1 << 12
# NumPy's short names, such as `f4`, and torch's.
_DTYPES: Final = {f"{name[0]}{ITEM_SIZES[name]}": name for name in NUMPY_DTYPES}
# Objects, bytes, texts, records, dates and times; in an archive, records begin with a bracket.
_NO_NUMBERS: Final = tuple("OSaUVMm[")


def numpy_dtype(text: str) -> tuple[str, bool] | None:
    """Torch's name of a NumPy dtype such as ``"<f4"``, and whether it is big-endian.

    None for a dtype that is no number: objects, texts, dates, records.

    Raises:
        UnsupportedFormatError: another, such as a long double; nothing is said of its values.
    """
    plain = text.lstrip("<>|=")
    if plain[:1] in _NO_NUMBERS:
        return None
    if plain not in _DTYPES:
        raise UnsupportedFormatError(f"An array of dtype {text!r:.40}, which is not known here.")
    return _DTYPES[plain], text.startswith(">")


def strided_array(
    data: Record | Source | bytes, dtype: tuple[str, bool], shape: Any, fortran: bool
) -> StoredTensor:
    """An array of plain bytes.

    Raises:
        CorruptCheckpointError: the shape does not fit the bytes.
    """
    name, swapped = dtype
    if type(shape) is not tuple or not is_shape(shape):
        raise CorruptCheckpointError("Damaged: an array whose shape makes no sense.")
    check_limit(len(shape), MAX_DIMENSIONS, "dimensions of an array")
    if not isinstance(data, Record):
        data = Record(data if isinstance(data, Source) else Source.of(data), swapped)
    if math.prod(shape) * ITEM_SIZES[name] != data.source.size:
        raise CorruptCheckpointError(
            f"Damaged: an array of {math.prod(shape):,} elements of {name} is said to lie in "
            f"{data.source.size:,} bytes."
        )
    axes = range(len(shape))
    stride = tuple(math.prod(shape[:axis] if fortran else shape[axis + 1 :]) for axis in axes)
    return StridedTensor(name, shape, stride, data)


class PickledArray(StoredTensor, Stateful):
    """An array that NumPy makes empty and fills afterwards.

    Attributes:
        is_number: whether it has numbers in it, and so is a tensor.
    """

    dtype: str = "uint8"
    shape: tuple[int, ...] = (0,)
    has_values = False
    why = "it was never filled"

    def __init__(self) -> None:
        self.is_number = False
        self._filled: StoredTensor | None = None
        self._is_set = False

    def set_state(self, state: object) -> None:
        """Fill it: a version, shape, dtype, whether it is in Fortran's order, and the bytes."""
        if self._is_set:
            raise CorruptCheckpointError(
                "Ambiguous: its pickle changes something after it was made."
            )
        self._is_set = True
        if type(state) is not tuple or len(state) not in (4, 5):
            raise CorruptCheckpointError("Damaged: an array's state is none.")
        shape, described, fortran, data = state[-4:]
        try:
            dtype = _dtype_of(described)
        except UnsupportedFormatError:
            self.is_number, self.why = True, "its dtype is not known here"
            self.shape = shape if type(shape) is tuple and is_shape(shape) else (0,)
            return
        if dtype is None:
            self.why = "its elements are not numbers"
            self.held = data if type(data) is list else ()
            return
        if fortran not in (False, True):
            raise CorruptCheckpointError("Damaged: an array's order is none.")
        self._filled = filled = strided_array(_bytes_of(data), dtype, shape, bool(fortran))
        self.dtype, self.shape = filled.dtype, filled.shape
        self.is_number = self.has_values = True
        self.why = ""

    def storage(self) -> tuple[object, int]:
        """The bytes."""
        return self._filled.storage() if self._filled else (self, 0)

    def words(self) -> Words:
        """All elements in row-major order, as unsigned integers.

        Raises:
            CheckpointError: they cannot be read.
        """
        if self._filled is None:
            raise UnsupportedFormatError(f"An array cannot be read: {self.why}.")
        return self._filled.words()


def _dtype_of(described: object) -> tuple[str, bool] | None:
    """The dtype that a `numpy.dtype(…)` of the pickle stands for."""
    if not isinstance(described, Opaque) or described.name != "numpy.dtype":
        raise CorruptCheckpointError("Damaged: an array whose dtype is none.")
    # Where it changed later, the array would be another.
    described.given = True
    text = described.arguments[0] if described.arguments else None
    order = described.state[1] if type(described.state) is tuple and described.state[1:] else ""
    if type(text) is not str or type(order) is not str:
        raise UnsupportedFormatError("An array of a dtype that is not known here.")
    return numpy_dtype(order[:1] + text.lstrip("<>|=") if order else text)


def _bytes_of(data: object) -> Source | bytes:
    if type(data) is str and len(data) <= _LONGEST_TEXT:
        # Python 2's byte strings; those that are longer stay in the file.
        return data.encode("latin-1")
    if isinstance(data, (bytes, Source)):
        return data
    raise CorruptCheckpointError("Damaged: an array's bytes are none.")


def _reconstruct(_: tuple[Any, ...]) -> PickledArray:
    return PickledArray()


def _from_buffer(arguments: tuple[Any, ...]) -> object:
    data, described, shape, order = arguments
    if order not in ("C", "F"):
        raise ValueError
    dtype = _dtype_of(described)
    if dtype is None:
        return PickledArray()
    return strided_array(_bytes_of(data), dtype, shape, order == "F")


def _scalar(arguments: tuple[Any, ...]) -> object:
    """A number, as Python has it; None where it is of another kind."""
    dtype = None if len(arguments) < 2 else _dtype_of(arguments[0])
    if dtype is None:
        return None
    data = _bytes_of(arguments[1])
    name, swapped = dtype
    # A number is short, and long bytes stay in the file.
    if isinstance(data, Source) or len(data) != ITEM_SIZES[name]:
        raise CorruptCheckpointError("Damaged: a number of another size than its dtype.")
    return np.frombuffer(data, np.dtype(name).newbyteorder(">" if swapped else "<"))[0].item()


NUMPY_BUILDERS: Final = {
    f"numpy.{core}.{name}": builder
    for core in ("core", "_core")
    for name, builder in {
        "multiarray._reconstruct": _reconstruct,
        "multiarray.scalar": _scalar,
        "numeric._frombuffer": _from_buffer,
    }.items()
}
