"""Files of torch.save since torch 1.6, and of torch.jit.save: a zip file with a pickle in it."""

from __future__ import annotations

from dataclasses import replace

from bnfreeze.checkpoints.limits import MAX_PICKLE_BYTES, check_limit
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.reading import OpenFile
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.torch_tensors import TorchPickleReader
from bnfreeze.errors import CorruptCheckpointError, damaged

__all__ = ["read_torch_zip", "read_torchscript"]


def read_torchscript(file: OpenFile) -> Content:
    """The module that was saved, as a placeholder with its tensors.

    Its code entries are compressed; they are never read. What its pickle names are classes of that
    code, and not of Python: loading it calls nothing by these names.
    """
    content = read_torch_zip(file)
    return replace(
        content,
        made=tuple(made for made in content.made if not made.name.startswith("__torch__.")),
        remarks=("TorchScript: its code was not looked at. Calling the model runs that code.",),
    )


def read_torch_zip(file: OpenFile) -> Content:
    """What was saved, with a `StoredTensor` for each tensor."""
    folders = {name.partition("/")[0] for name in file.entries}
    if "data.pkl" not in file.entries and len(folders) > 1:
        raise CorruptCheckpointError("Ambiguous: the zip file has several folders at its top.")
    pickle = file.entry("data.pkl").source
    check_limit(pickle.size, MAX_PICKLE_BYTES, "bytes of a pickle")
    order = file.entries["byteorder"].source.head(10) if "byteorder" in file.entries else b"little"
    if order not in (b"little", b"big"):
        raise damaged(f"a byte order that does not exist: {order!r}.")

    def find(key: str, size: int, _: int) -> Source:
        entry = file.entries.get(f"data/{key}")
        if entry is None:
            raise damaged(f"a tensor's storage 'data/{key:.80}' is missing.")
        if entry.source.size != size:
            raise damaged(
                f"a storage is said to have {size:,} bytes, and 'data/{key:.80}' has "
                f"{entry.size:,}."
            )
        return entry.source

    reader = TorchPickleReader(find, is_big_endian=order == b"big")
    return reader.read(Source.of(pickle.read()))
