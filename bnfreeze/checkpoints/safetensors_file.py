"""Safetensors files: a header of JSON that says where each tensor lies, then their bytes."""

from __future__ import annotations

from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_HEADER_BYTES, MAX_TENSORS, check_limit, is_size
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.reading import OpenFile, naming_file, read_json
from bnfreeze.checkpoints.stored_tensor import (
    ITEM_SIZES,
    NUMPY_DTYPES,
    StoredTensor,
    packed_tensor,
)
from bnfreeze.errors import UnsupportedFormatError, damaged

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
    """
    source = file.source
    length = int.from_bytes(source.read(0, 8), "little")
    check_limit(length, MAX_HEADER_BYTES, "bytes of a safetensors header")
    header = read_json(source.read(8, length), "its header")
    header.pop("__metadata__", None)
    check_limit(len(header), MAX_TENSORS, "tensors")
    data = source.part(8 + length, source.size - 8 - length)
    places = {name: _place(description) for name, description in header.items()}
    whole = max((end for _, end in places.values()), default=0)
    if whole != data.size:
        raise damaged(f"its tensors should take {whole:,} bytes, and there are {data.size:,}.")
    position = 0
    tensors: dict[str, StoredTensor] = {}
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        if begin != position:
            raise damaged(f"{name!r:.200} does not follow the one before.")
        dtype, shape = header[name].get("dtype"), header[name].get("shape")
        if type(dtype) is not str or type(shape) is not list:
            raise damaged("its header does not describe tensors.")
        if dtype not in DTYPES:
            raise UnsupportedFormatError(f"{name!r:.200} is of dtype {dtype!r:.40}, unknown here.")
        with naming_file(f"{name!r:.200}"):
            tensors[name] = packed_tensor(DTYPES[dtype], shape, data.part(begin, end - begin))
        position = end
    return Content(tensors)


def _place(description: Any) -> tuple[int, int]:
    try:
        begin, end = description["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise damaged("its header does not describe tensors.") from None
    if not (is_size(begin) and is_size(end) and begin <= end):
        raise damaged("its header has a place that makes no sense.")
    return begin, end
