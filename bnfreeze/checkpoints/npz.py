"""NumPy's `.npz` archives: one `.npy` file for each array."""

from __future__ import annotations

import re
import zlib
from typing import Final

from bnfreeze.checkpoints.limits import MAX_TENSORS, check_limit
from bnfreeze.checkpoints.numpy_arrays import numpy_dtype
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.reading import OpenFile
from bnfreeze.checkpoints.stored_tensor import (
    DescribedTensor,
    Record,
    StoredTensor,
    packed_tensor,
)
from bnfreeze.checkpoints.zips import Entry
from bnfreeze.errors import CorruptCheckpointError, UnsafeCheckpointError

__all__ = ["read_npz"]

# A header is a line of text that says the dtype and the shape. Sizes of so many digits are refused
# as numbers, and not by Python.
_LONGEST_HEADER: Final = 10_000
_HEADER: Final = re.compile(
    rb"\{'descr': ('[^']*'|\[.*\]), 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,20}(?:, \d{1,20})*|),?\), \} *\n"
)


def read_npz(file: OpenFile) -> Content:
    """The arrays by name.

    Raises:
        UnsafeCheckpointError: it is compressed, as by `numpy.savez_compressed`.
        CheckpointError: refused or damaged.
    """
    check_limit(len(file.entries), MAX_TENSORS, "arrays")
    # A folder at the top is not the archive's own here: the names may all begin with net/.
    return Content(
        {entry.name.removesuffix(".npy"): _array(entry) for entry in file.entries.values()}
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
        raise CorruptCheckpointError(f"Damaged: {entry.name!r:.200} is no array.")
    begin = 10 if start[6:7] == b"\1" else 12
    length = int.from_bytes(start[8:begin], "little")
    check_limit(length, _LONGEST_HEADER, "bytes of an array's header")
    header = _HEADER.fullmatch(source.read(begin, length))
    if header is None:
        raise CorruptCheckpointError(f"Damaged: {entry.name!r:.200} has a header that is none.")
    dtype, fortran, sizes = (part.decode("ascii", "replace") for part in header.groups())
    number = numpy_dtype(dtype.strip("'"))
    if number is None:
        return DescribedTensor("uint8", (0,), "its elements are not numbers")
    shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    begin += length
    data = source.part(begin, source.size - begin)
    record = Record(data, number[1], entry.checksum, before=zlib.crc32(source.read(0, begin)))
    return packed_tensor(number[0], shape, record, fortran == "True")
