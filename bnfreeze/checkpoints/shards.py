"""A Hugging Face index: a JSON file that says in which of several files each tensor lies."""

from __future__ import annotations

from bnfreeze.checkpoints.kinds import read_file
from bnfreeze.checkpoints.limits import MAX_HEADER_BYTES, MAX_TENSORS, check_limit
from bnfreeze.checkpoints.pickled import Content, Opaque, Pairs, tensor_in
from bnfreeze.checkpoints.reading import OpenFile, naming_file, read_json
from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsupportedFormatError,
    damaged,
)

__all__ = ["read_shards"]


def read_shards(file: OpenFile) -> Content:
    """The tensors of all shards by name, in the order of the index. The shards lie beside it."""
    check_limit(file.source.size, MAX_HEADER_BYTES, "bytes of an index")
    places = read_json(file.source.read(), "the index").get("weight_map")
    if type(places) is not dict:
        raise UnsupportedFormatError("JSON, but no index of shards: it has no weight_map.")
    check_limit(len(places), MAX_TENSORS, "tensors")
    if any(type(place) is not str for place in places.values()):
        raise damaged("the index has a shard whose name is no text.")
    shards: dict[str, dict[str, StoredTensor]] = {}
    made: list[Opaque] = []
    seen: set[object] = set()
    for place in dict.fromkeys(places.values()):
        with naming_file(f"Shard {place}"):
            shard = file.beside(place)
            # However it is named: reading one file again and again could go on for ever.
            if shard.source.identity() in seen:
                raise CorruptCheckpointError("It is the same file as another shard.")
            seen.add(shard.source.identity())
            _, content = read_file(shard)
            root = content.root.named() if isinstance(content.root, Pairs) else content.root
            if not isinstance(root, dict):
                raise CheckpointError("It holds no tensors by name.")
            tensors = {name: tensor_in(value) for name, value in root.items()}
            shards[place] = {name: one for name, one in tensors.items() if one is not None}
            made += content.made
            check_limit(sum(map(len, shards.values())), MAX_TENSORS, "tensors")
    for name, place in places.items():
        if name not in shards[place]:
            raise CorruptCheckpointError(
                f"Shard {place}: {name!r:.200} is said to be in it, and is not."
            )
    found = {name: shards[place][name] for name, place in places.items()}
    for held in shards.values():
        for name, tensor in held.items():
            # What the index leaves out is loaded with its shard all the same.
            if found.setdefault(name, tensor) is not tensor:
                raise CorruptCheckpointError(f"Ambiguous: {name!r:.200} is in two shards.")
    return Content(found, tuple(made))
