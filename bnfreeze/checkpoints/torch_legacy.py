"""Files of torch.save as it wrote them before torch 1.6: pickles, one after the other, then bytes.

In order: a magic number, a protocol version, the machine's sizes, what was saved, the storages'
keys, and for each key a count and that many elements.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_PICKLE_BYTES, MAX_TENSORS, check_limit
from bnfreeze.checkpoints.pickles import Pairs, read_pickle
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import Record
from bnfreeze.checkpoints.torch_names import ALLOWED
from bnfreeze.checkpoints.torch_tensors import read_torch_pickle, refused_with_advice
from bnfreeze.errors import CorruptCheckpointError, UnsafeCheckpointError, UnsupportedFormatError

__all__ = ["read_torch_legacy"]

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_VERSION: Final = 1001


def read_torch_legacy(source: Source) -> Any:
    """What was saved, with a `StoredTensor` for each tensor.

    Raises:
        CheckpointError: refused, damaged, or a pickle that torch.save did not write.
    """
    data = source.head(MAX_PICKLE_BYTES)
    records: dict[str, Record] = {}
    elements: dict[str, int] = {}

    def find(key: str, size: int, item_size: int) -> Record:
        if key not in records:
            records[key] = Record(source.unplaced(size))
            elements[key] = size // item_size
        if records[key].source.size != size:
            raise CorruptCheckpointError("Damaged: a storage is said to have several sizes.")
        return records[key]

    try:
        position = _preamble(data)
        root, position = read_torch_pickle(data, find, start=position)
        keys, position = read_pickle(data, ALLOWED, start=position)
    except UnsafeCheckpointError as refusal:
        raise refused_with_advice(refusal) from None
    _place(source, position, keys, records, elements)
    return root


def _preamble(data: bytes) -> int:
    """Check what comes before the saved object, and tell where that begins."""
    magic, position = read_pickle(data, ALLOWED)
    if type(magic) is not int or magic != _MAGIC:
        raise UnsupportedFormatError(
            "A pickle that torch.save did not write. Where you trust it, load it yourself and "
            "save it with torch.save."
        )
    version, position = read_pickle(data, ALLOWED, start=position)
    system, position = read_pickle(data, ALLOWED, start=position)
    if type(version) is not int or version != _VERSION or not isinstance(system, Pairs):
        raise CorruptCheckpointError("Damaged: the beginning is not that of a file of torch.save.")
    if system.named().get("little_endian") is not True:
        raise UnsupportedFormatError("Saved on a big-endian machine before torch 1.6.")
    return position


def _place(
    source: Source,
    position: int,
    keys: object,
    records: dict[str, Record],
    elements: dict[str, int],
) -> None:
    """Find each storage's bytes, which lie one after the other in the order of `keys`."""
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise CorruptCheckpointError("Damaged: the list of storages is none.")
    check_limit(len(keys), MAX_TENSORS, "storages")
    if len(set(keys)) != len(keys) or set(keys) != records.keys():
        raise CorruptCheckpointError("Damaged: the storages listed are not those that tensors use.")
    for key in keys:
        (count,) = struct.unpack("<q", source.read(position, 8))
        record = records[key].source
        if count != elements[key]:
            raise CorruptCheckpointError(
                f"Damaged: a storage is said to have {elements[key]:,} elements here and "
                f"{count:,} there."
            )
        record.placed(position + 8, source)
        position += 8 + record.size
    if position != source.size:
        raise CorruptCheckpointError(
            f"Damaged: {source.size - position:,} bytes follow after the last storage."
        )
