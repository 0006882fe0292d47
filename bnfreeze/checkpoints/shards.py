"""A Hugging Face index: a JSON file that says in which of several files each tensor lies."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

from bnfreeze.checkpoints.kinds import read_file
from bnfreeze.checkpoints.limits import MAX_HEADER_BYTES, MAX_TENSORS, check_limit
from bnfreeze.checkpoints.pickled import Content, Opaque, Pairs, tensor_in
from bnfreeze.checkpoints.reading import OpenFile, read_json
from bnfreeze.checkpoints.source import FilePath
from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)

__all__ = ["beside", "read_shards"]


def read_shards(file: OpenFile) -> Content:
    """The tensors of all shards by name, in the order of the index. The shards lie beside it.

    Raises:
        UnsupportedFormatError: JSON, but no such index.
        CorruptCheckpointError: a shard is missing, or has not the tensors that it should.
        UnsafeCheckpointError: a shard is said to lie elsewhere, or all together are too many.
    """
    check_limit(file.source.size, MAX_HEADER_BYTES, "bytes of an index")
    places = read_json(file.source.read(0, file.source.size), "the index").get("weight_map")
    if type(places) is not dict:
        raise UnsupportedFormatError("JSON, but no index of shards: it has no weight_map.")
    check_limit(len(places), MAX_TENSORS, "tensors")
    if any(type(place) is not str for place in places.values()):
        raise CorruptCheckpointError("Damaged: the index has a shard whose name is no text.")
    shards: dict[str, dict[str, StoredTensor]] = {}
    made: list[Opaque] = []
    seen: set[tuple[int, int]] = set()
    for place in dict.fromkeys(places.values()):
        try:
            shard = file.beside(beside(file.path.parent, place))
            # However it is named: reading one file again and again could go on for ever.
            if shard.source.identity() in seen:
                raise CorruptCheckpointError("It is the same file as another shard.")
            seen.add(shard.source.identity())
            shards[place], objects = _tensors_of(shard)
            made += objects
            check_limit(sum(map(len, shards.values())), MAX_TENSORS, "tensors")
        except CheckpointError as error:
            raise type(error)(f"Shard {place}: {error}") from None
    for name, place in places.items():
        if name not in shards[place]:
            raise CorruptCheckpointError(
                f"Shard {place}: {name!r:.200} is said to be in it, and is not."
            )
    found = {name: shards[place][name] for name, place in places.items()}
    for tensors in shards.values():
        for name, tensor in tensors.items():
            # What the index leaves out is loaded with its shard all the same.
            if found.setdefault(name, tensor) is not tensor:
                raise CorruptCheckpointError(f"Ambiguous: {name!r:.200} is in two shards.")
    return Content(found, tuple(made))


def _tensors_of(shard: OpenFile) -> tuple[dict[str, StoredTensor], tuple[Opaque, ...]]:
    _, content = read_file(shard, shard=True)
    root = content.root.named() if isinstance(content.root, Pairs) else content.root
    if not isinstance(root, dict):
        raise CheckpointError("It holds no tensors by name.")
    found = {name: tensor_in(value) for name, value in root.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}, content.made


def beside(folder: FilePath, name: str) -> FilePath:
    """The path of a file that another file names: a plain name, and so beside it.

    Raises:
        UnsafeCheckpointError: anything but a plain name.
    """
    plain = all(kind(name).name == name for kind in (PurePosixPath, PureWindowsPath))
    if not plain or name in {"", ".", ".."}:
        raise UnsafeCheckpointError(
            f"Refused: it refers to {name!r:.200}, and not to a file beside it."
        )
    return folder / name
