"""Files of torch.save since torch 1.6, and of torch.jit.save: a zip file with a pickle in it."""

from __future__ import annotations

from dataclasses import replace

from bnfreeze.checkpoints.limits import MAX_PICKLE_BYTES, check_limit
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.reading import OpenFile
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import Record
from bnfreeze.checkpoints.torch_tensors import TorchPickleReader
from bnfreeze.errors import CorruptCheckpointError

__all__ = ["read_torch_zip", "read_torchscript"]


def read_torchscript(file: OpenFile) -> Content:
    """The module that was saved, as a placeholder with its tensors.

    Its code entries are compressed; they are never read. What its pickle names are classes of that
    code, and not of Python: loading it calls nothing by these names.

    Raises:
        CheckpointError: refused or damaged.
    """
    content = read_torch_zip(file)
    return replace(
        content,
        made=tuple(made for made in content.made if not made.name.startswith("__torch__.")),
        remarks=("TorchScript: its code was not looked at. Calling the model runs that code.",),
    )


def read_torch_zip(file: OpenFile) -> Content:
    """What was saved, with a `StoredTensor` for each tensor.

    Raises:
        CheckpointError: refused or damaged.
    """
    folders = {name.partition("/")[0] for name in file.entries}
    if "data.pkl" not in file.entries and len(folders) > 1:
        raise CorruptCheckpointError("Ambiguous: the zip file has several folders at its top.")
    pickle = file.entry("data.pkl")
    check_limit(pickle.source.size, MAX_PICKLE_BYTES, "bytes of a pickle")
    swapped = _is_big_endian(file)
    found: dict[str, Record] = {}

    def find(key: str, size: int, _: int) -> Record:
        if key not in found:
            entry = file.entries.get(f"data/{key}")
            if entry is None:
                raise CorruptCheckpointError(
                    f"Damaged: a tensor's storage 'data/{key:.80}' is missing."
                )
            found[key] = Record(entry.source, swapped, entry.checksum)
        if found[key].source.size != size:
            raise CorruptCheckpointError(
                f"Damaged: a storage is said to have {size:,} bytes, "
                f"and 'data/{key:.80}' has {found[key].source.size:,}."
            )
        return found[key]

    return TorchPickleReader(find).read(Source.of(pickle.read()))


def _is_big_endian(file: OpenFile) -> bool:
    if "byteorder" not in file.entries:
        return False
    order = file.entries["byteorder"].source.head(10)
    if order not in (b"little", b"big"):
        raise CorruptCheckpointError(f"Damaged: a byte order that does not exist: {order!r}.")
    return order == b"big"
