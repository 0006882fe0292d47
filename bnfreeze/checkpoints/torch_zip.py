"""Files of torch.save as it writes them since torch 1.6: a zip file with a pickle in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnfreeze.checkpoints.limits import MAX_PICKLE_BYTES, check_limit
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import Record
from bnfreeze.checkpoints.torch_tensors import read_torch_pickle, refused_with_advice
from bnfreeze.checkpoints.zips import Entry, read_directory
from bnfreeze.errors import CorruptCheckpointError, UnsafeCheckpointError, UnsupportedFormatError

__all__ = ["read_torch_zip"]


def read_torch_zip(source: Source) -> Any:
    """What was saved, with a `StoredTensor` for each tensor.

    Raises:
        CheckpointError: refused, damaged, or another kind of zip file.
    """
    records = _records(read_directory(source, _recognise))
    pickle = records["data.pkl"]
    check_limit(pickle.source.size, MAX_PICKLE_BYTES, "bytes of a pickle")
    order = records["byteorder"].source.head(10) if "byteorder" in records else b"little"
    if order not in (b"little", b"big"):
        raise CorruptCheckpointError(f"Damaged: a byte order that does not exist: {order!r}.")
    found: dict[str, Record] = {}

    def find(key: str, size: int, _: int) -> Record:
        if key not in found:
            entry = records.get(f"data/{key}")
            if entry is None:
                raise CorruptCheckpointError(
                    f"Damaged: a tensor's storage 'data/{key:.80}' is missing."
                )
            found[key] = Record(entry.source, order == b"big", entry.checksum)
        if found[key].source.size != size:
            raise CorruptCheckpointError(
                f"Damaged: a storage is said to have {size:,} bytes, "
                f"and 'data/{key:.80}' has {found[key].source.size:,}."
            )
        return found[key]

    try:
        return read_torch_pickle(pickle.read(), find)[0]
    except UnsafeCheckpointError as refusal:
        raise refused_with_advice(refusal) from None


def _recognise(names: Iterable[str]) -> None:
    """Raise for zip files of other kinds."""
    below = {name.partition("/")[2] for name in names}
    if "constants.pkl" in below or any(name.startswith("code/") for name in below):
        raise UnsupportedFormatError(
            "A TorchScript file: it holds code. Where you trust it, save its values alone: "
            "torch.save(torch.jit.load(file).state_dict(), 'weights.pt')."
        )
    if "data.pkl" not in below:
        raise UnsupportedFormatError("A zip file, but none of torch.save: it has no data.pkl.")


def _records(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries by their names below the archive's own folder."""
    folders = {name.partition("/")[0] for name in entries}
    records = {name.partition("/")[2]: entry for name, entry in entries.items()}
    if len(folders) > 1 or len(records) < len(entries):
        raise CorruptCheckpointError("Ambiguous: the zip file has several folders at its top.")
    return records
