"""NumPy's `.npz` archives: one `.npy` file for each array."""

from __future__ import annotations

import io

import numpy as np

from bnfreeze.checkpoints.limits import MAX_TENSORS, check_limit
from bnfreeze.checkpoints.numpy_arrays import numpy_dtype, strided_array
from bnfreeze.checkpoints.reading import Content, OpenFile
from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.checkpoints.torch_tensors import DescribedTensor
from bnfreeze.checkpoints.zips import Entry
from bnfreeze.errors import CorruptCheckpointError, UnsafeCheckpointError

__all__ = ["read"]

# A header is a line of text that says the dtype and the shape.
_LONGEST_HEADER = 10_000


def read(file: OpenFile) -> Content:
    """The arrays by name.

    Raises:
        UnsafeCheckpointError: it is compressed, as by `numpy.savez_compressed`.
        CheckpointError: refused or damaged.
    """
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
    stream = io.BytesIO(source.head(_LONGEST_HEADER + 20))
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read_header(stream, max_header_size=_LONGEST_HEADER)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError, Warning):
        raise CorruptCheckpointError(f"Damaged: {entry.name!r:.200} is no array.") from None
    if (number := numpy_dtype(dtype.str)) is None:
        return DescribedTensor("uint8", (0,), "its elements are not numbers")
    return strided_array(
        source.part(stream.tell(), source.size - stream.tell()), number, shape, fortran
    )
