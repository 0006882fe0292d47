"""NumPy's arrays, scalars and dtypes in a pickle, described as data; and archives, `.npz`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from bnfreeze.checkpoints.limits import MAX_TENSORS, check_limit, checked_shape
from bnfreeze.checkpoints.pickled import Content, Opaque
from bnfreeze.checkpoints.reading import OpenFile
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import (
    ITEM_SIZES,
    NUMPY_DTYPES,
    DescribedTensor,
    StoredTensor,
    StridedTensor,
    packed_tensor,
)
from bnfreeze.checkpoints.zips import Entry
from bnfreeze.errors import UnsafeCheckpointError, UnsupportedFormatError, damaged

_LONGEST_TEXT: Final = 1 << 12
# NumPy's short names, such as `f4`, and torch's.
_DTYPES: Final = {f"{name[0]}{ITEM_SIZES[name]}": name for name in NUMPY_DTYPES}
# Objects, bytes, texts, records, dates and times; in an archive, records begin with a bracket.
_NO_NUMBERS: Final = tuple("OSaUVMm[")
# A header is a line of text that says the dtype and the shape. Sizes of so many digits are refused
# as numbers, and not by Python.
_LONGEST_HEADER: Final = 10_000
_HEADER: Final = re.compile(
    rb"\{'descr': ('[^']*'|\[.*\]), 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,20}(?:, \d{1,20})*|),?\), \} *\n"
)


def _dtype(text: str) -> tuple[str, bool] | None:
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


# What NumPy makes empty and fills afterwards, by its newer name.
_EMPTY_ARRAY: Final = "numpy._core.multiarray._reconstruct"


def fill_array(made: Opaque) -> None:
    """Give an array its content: a version, shape, dtype, whether it is in Fortran's order, bytes.

    An object that is no array stays as it is.

    Raises:
        CorruptCheckpointError: its state is not that of an array.
    """
    if made.name != _EMPTY_ARRAY:
        return
    state, made.state, made.given = made.state, None, True
    if type(state) is not tuple or len(state) not in (4, 5):
        raise damaged("an array's state is none.")
    shape, described, fortran, data = state[-4:]
    try:
        dtype = _dtype_of(described)
    except UnsupportedFormatError:
        made.array = DescribedTensor("uint8", checked_shape(shape), "its dtype is not known here")
        return
    if dtype is None:
        # Its elements are not numbers, and may be anything.
        made.state = data if type(data) is list else None
        return
    if fortran not in (False, True):
        raise damaged("an array's order is none.")
    made.array = _array(data, dtype, shape, is_fortran=bool(fortran))


def _dtype_of(described: object) -> tuple[str, bool] | None:
    """The dtype that a `numpy.dtype(…)` of the pickle stands for."""
    if not isinstance(described, Opaque) or described.name != "numpy.dtype":
        raise damaged("an array whose dtype is none.")
    # Where it changed later, the array would be another.
    described.given = True
    text = described.arguments[0] if described.arguments else None
    order = described.state[1] if type(described.state) is tuple and described.state[1:] else ""
    if type(text) is not str or type(order) is not str:
        raise UnsupportedFormatError("An array of a dtype that is not known here.")
    return _dtype(order[:1] + text.lstrip("<>|=") if order else text)


def _array(
    data: object, dtype: tuple[str, bool], shape: object, *, is_fortran: bool = False
) -> StridedTensor:
    if type(data) is str and len(data) <= _LONGEST_TEXT:
        # Python 2's byte strings; those that are longer stay in the file.
        data = data.encode("latin-1")
    source = Source.of(data) if type(data) is bytes else data
    if not isinstance(source, Source):
        raise damaged("an array's bytes are none.")
    return packed_tensor(dtype[0], shape, source, is_swapped=dtype[1], is_fortran=is_fortran)


def _empty(*_: object) -> Opaque:
    return Opaque(_EMPTY_ARRAY, ())


def _from_buffer(data: object, described: object, shape: object, order: object) -> object:
    if order not in ("C", "F"):
        raise ValueError
    dtype = _dtype_of(described)
    return None if dtype is None else _array(data, dtype, shape, is_fortran=order == "F")


def _scalar(described: object, data: object) -> object:
    """A number, as Python has it; None where it is of another kind."""
    dtype = _dtype_of(described)
    values = None if dtype is None else _array(data, dtype, ()).values()
    return None if values is None else values.item()


_BUILDERS: Final[dict[str, Callable[..., object]]] = {
    "multiarray._reconstruct": _empty,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
}
NUMPY_BUILDERS: Final = {
    f"numpy.{core}.{name}": builder
    for core in ("core", "_core")
    for name, builder in _BUILDERS.items()
}


def read_npz(file: OpenFile) -> Content:
    """The arrays by name. One that is compressed, as by `numpy.savez_compressed`, is refused."""
    check_limit(len(file.entries), MAX_TENSORS, "arrays")
    # A folder at the top is not the archive's own here: the names may all begin with net/.
    return Content(
        {entry.name.removesuffix(".npy"): _array_in(entry) for entry in file.entries.values()}
    )


def _array_in(entry: Entry) -> StoredTensor:
    if isinstance(entry.refusal, UnsafeCheckpointError):
        raise UnsafeCheckpointError(
            f"{entry.refusal} numpy.savez_compressed writes such files: load the file where you "
            f"trust it, and save it with numpy.savez."
        )
    source = entry.source
    start = source.head(12)
    if start[:6] != b"\x93NUMPY" or start[6:7] not in (b"\1", b"\2"):
        raise damaged(f"{entry.name!r:.200} is no array.")
    begin = 10 if start[6:7] == b"\1" else 12
    length = int.from_bytes(start[8:begin], "little")
    check_limit(length, _LONGEST_HEADER, "bytes of an array's header")
    header = _HEADER.fullmatch(source.read(begin, length))
    if header is None:
        raise damaged(f"{entry.name!r:.200} has a header that is none.")
    dtype, fortran, sizes = (part.decode("ascii", "replace") for part in header.groups())
    number = _dtype(dtype.strip("'"))
    if number is None:
        return DescribedTensor("uint8", (0,), "its elements are not numbers")
    shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    return _array(source.after(begin + length), number, shape, is_fortran=fortran == "True")
