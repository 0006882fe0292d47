"""Safetensors files: a header of JSON that says where each tensor lies, then their bytes."""

from __future__ import annotations

from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_HEADER_BYTES, MAX_TENSORS, check_limit, is_size
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.reading import OpenFile, read_json
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import (
    ITEM_SIZES,
    NUMPY_DTYPES,
    Record,
    StoredTensor,
    packed_tensor,
)
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError

__all__ = ["DTYPES", "read_safetensors"]

# Safetensors' names: of most, the first letter and the bits.
DTYPES: Final = {
    f"{name[0].upper()}{8 * ITEM_SIZES[name]}": name
    for name in NUMPY_DTYPES - {"bool", "complex128"}
} | {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def read_safetensors(file: OpenFile) -> Content:
    """The tensors by name, in the order in which they lie in the file.

    As the format asks for, they must lie one after the other, without a gap, to the very end.

    Raises:
        CorruptCheckpointError: its parts contradict each other, or a name stands there twice.
        UnsafeCheckpointError: beyond the limits.
    """
    source = file.source
    length = int.from_bytes(source.read(0, 8), "little")
    check_limit(length, MAX_HEADER_BYTES, "bytes of a safetensors header")
    header = read_json(source.read(8, length), "its header")
    metadata = header.pop("__metadata__", None)
    check_limit(len(header), MAX_TENSORS, "tensors")
    data = source.part(8 + length, source.size - 8 - length)
    places = {name: _place(description) for name, description in header.items()}
    names = sorted(places, key=lambda name: places[name])
    end = 0
    for name in names:
        if places[name][0] != end:
            raise CorruptCheckpointError(f"Damaged: {name!r:.200} does not follow the one before.")
        end = places[name][1]
    if end != data.size:
        raise CorruptCheckpointError(
            f"Damaged: its tensors should take {end:,} bytes, and there are {data.size:,}."
        )
    tensors = {name: _tensor(name, header[name], data) for name in names}
    if isinstance(metadata, dict):
        # save_model writes what several names share once, and notes the other names here.
        tensors |= {
            name: tensors[kept]
            for name, kept in metadata.items()
            if name not in tensors and type(kept) is str and kept in tensors
        }
        check_limit(len(tensors), MAX_TENSORS, "tensors")
    return Content(tensors)


def _place(description: Any) -> tuple[int, int]:
    try:
        begin, end = description["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CorruptCheckpointError("Damaged: its header does not describe tensors.") from None
    if not (is_size(begin) and is_size(end) and begin <= end):
        raise CorruptCheckpointError("Damaged: its header has a place that makes no sense.")
    return begin, end


def _tensor(name: str, description: dict[str, Any], data: Source) -> StoredTensor:
    dtype, shape = description.get("dtype"), description.get("shape")
    if type(dtype) is not str or type(shape) is not list:
        raise CorruptCheckpointError("Damaged: its header does not describe tensors.")
    if dtype not in DTYPES:
        raise UnsupportedFormatError(f"{name!r:.200} is of dtype {dtype!r:.40}, unknown here.")
    begin, end = description["data_offsets"]
    try:
        return packed_tensor(DTYPES[dtype], shape, Record(data.part(begin, end - begin)))
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{name!r:.200}: {error}") from None
