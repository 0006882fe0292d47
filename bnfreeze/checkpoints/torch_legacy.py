"""Files of torch.save as it wrote them before torch 1.6: pickles, one after the other, then bytes.

A plain pickle, as of `pickle.dump`, may have such a file inside for each storage.

In order: a magic number, a protocol version, the machine's sizes, what was saved, the storages'
keys, and for each key a count and that many elements.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Final

from bnfreeze.checkpoints.limits import MAX_TENSORS, check_limit
from bnfreeze.checkpoints.pickled import Content, Pairs
from bnfreeze.checkpoints.pickles import PickleReader
from bnfreeze.checkpoints.placeholders import naming_calls
from bnfreeze.checkpoints.reading import OpenFile
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.torch_tensors import TorchPickleReader
from bnfreeze.errors import UnsupportedFormatError, damaged

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_VERSION: Final = 1001


def read_torch_legacy(file: OpenFile) -> Content:
    """What was saved, with a `StoredTensor` for each tensor.

    A single storage, where the file stands for one inside a plain pickle.
    """
    source = file.source
    storages: dict[str, Source] = {}
    elements: dict[str, int] = {}
    starts: dict[str, int] = {}

    def find(key: str, size: int, item_size: int) -> Source:
        if key not in storages:
            storages[key] = source.later(lambda: starts[key], size)
            elements[key] = size // item_size
        if storages[key].size != size:
            raise damaged("a storage is said to have several sizes.")
        return storages[key]

    content = TorchPickleReader(find).read(source, _preamble(source))
    keys = PickleReader().read(source, content.end)
    made = (*content.made, *keys.made)
    with naming_calls(made):
        if type(keys.root) is not list or any(type(key) is not str for key in keys.root):
            raise damaged("the list of storages is none.")
        check_limit(len(keys.root), MAX_TENSORS, "storages")
        if sorted(keys.root) != sorted(storages):
            raise damaged("the storages listed are not those that tensors use.")
        position = keys.end
        for key in keys.root:
            (count,) = struct.unpack("<q", source.read(position, 8))
            if count != elements[key]:
                raise damaged(
                    f"a storage is said to have {elements[key]:,} elements here and {count:,} "
                    f"there."
                )
            starts[key] = position + 8
            position += 8 + source.part(position + 8, storages[key].size).size
        if position != source.size:
            raise damaged(f"{source.size - position:,} bytes follow after the last storage.")
    return replace(content, made=made)


def read_plain_pickle(file: OpenFile) -> Content:
    """What was saved, with a `StoredTensor` for each array and each tensor."""
    reader = TorchPickleReader(None, lambda source: read_torch_legacy(OpenFile(source)))
    content = reader.read(file.source)
    if content.end != file.source.size:
        # A second pickle would not be read, and nothing be said of it.
        raise damaged(f"{file.source.size - content.end:,} bytes follow after its pickle.")
    return content


def _preamble(source: Source) -> int:
    """Check what comes before the saved object, and give the position where that begins."""
    magic = PickleReader().read(source)
    version = PickleReader().read(source, magic.end)
    system = PickleReader().read(source, version.end)
    if magic.root != _MAGIC or version.root != _VERSION or not isinstance(system.root, Pairs):
        raise damaged("the beginning is not that of a file of torch.save.")
    if system.root.named().get("little_endian") is not True:
        raise UnsupportedFormatError("Saved on a big-endian machine before torch 1.6.")
    return system.end
