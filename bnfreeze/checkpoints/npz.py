"""NumPy's `.npz` archives: one `.npy` file for each array."""

from __future__ import annotations

import re
from typing import Final

from bnfreeze.checkpoints.limits import MAX_TENSORS, check_limit
from bnfreeze.checkpoints.numpy_arrays import numpy_dtype
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.reading import OpenFile
from bnfreeze.checkpoints.stored_tensor import DescribedTensor, StoredTensor, packed_tensor
from bnfreeze.checkpoints.zips import Entry
from bnfreeze.errors import UnsafeCheckpointError, damaged

__all__ = ["read_npz"]

# A header is a line of text that says the dtype and the shape. Sizes of so many digits are refused
# as numbers, and not by Python.
_LONGEST_HEADER: Final = 10_000
_HEADER: Final = re.compile(
    rb"\{'descr': ('[^']*'|\[.*\]), 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,20}(?:, \d{1,20})*|),?\), \} *\n"
)


def read_npz(file: OpenFile) -> Content:
    """The arrays by name. One that is compressed, as by `numpy.savez_compressed`, is refused."""
    check_limit(len(file.entries), MAX_TENSORS, "arrays")
    return Content(
        {name.removesuffix(".npy"): _array(entry) for name, entry in file.entries.items()}
    )


def _array(entry: Entry) -> StoredTensor:
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
    number = numpy_dtype(dtype.strip("'"))
    if number is None:
        return DescribedTensor("uint8", (0,), "its elements are not numbers")
    shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    return packed_tensor(
        number[0],
        shape,
        source.after(begin + length),
        is_swapped=number[1],
        is_fortran=fortran == "True",
    )
