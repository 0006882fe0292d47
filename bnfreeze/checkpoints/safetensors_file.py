"""Safetensors files: the library checks the header, and what it lets pass is checked here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from bnfreeze.checkpoints.json_objects import read_json
from bnfreeze.checkpoints.limits import MAX_HEADER_BYTES, MAX_TENSORS, check_limit
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import Record, StoredTensor, StridedTensor
from bnfreeze.errors import CheckpointError, CorruptCheckpointError

__all__ = ["read_safetensors"]

_DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_safetensors(source: Source, path: Path) -> dict[str, StoredTensor]:
    """The tensors by name, in the order in which they lie in the file.

    Raises:
        CorruptCheckpointError: what the library finds wrong, or a name that stands there twice.
        UnsafeCheckpointError: beyond the limits.
    """
    length = int.from_bytes(source.read(0, 8), "little")
    check_limit(length, MAX_HEADER_BYTES, "bytes of a safetensors header")
    header = read_json(source.read(8, length), "its header")
    header.pop("__metadata__", None)
    check_limit(len(header), MAX_TENSORS, "tensors")
    try:
        # Opening is checking: offsets in order, without gaps, of the sizes that shapes ask for.
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise CorruptCheckpointError(f"Damaged: {error}.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot be read: {error}.") from None
    if names != header.keys():
        raise CorruptCheckpointError("Ambiguous: its header can be read in two ways.")
    data = source.part(8 + length, source.size - 8 - length)
    tensors = {name: _tensor(told, data) for name, told in header.items()}
    return dict(sorted(tensors.items(), key=lambda item: header[item[0]]["data_offsets"]))


def _tensor(told: Any, data: Source) -> StoredTensor:
    try:
        begin, end = told["data_offsets"]
        shape = tuple(told["shape"])
        # What has no name here keeps its own, and is refused by it.
        dtype = _DTYPES.get(told["dtype"], str(told["dtype"]))
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return StridedTensor(dtype, shape, stride, Record(data.part(begin, end - begin)))
    except (KeyError, TypeError, ValueError):
        raise CorruptCheckpointError("Damaged: its header does not describe tensors.") from None
