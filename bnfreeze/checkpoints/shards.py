"""A Hugging Face index: a JSON file that says in which of several files each tensor lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from bnfreeze.checkpoints.json_objects import read_json
from bnfreeze.checkpoints.limits import MAX_HEADER_BYTES, MAX_TENSORS, check_limit
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)

__all__ = ["beside", "read_index"]


def read_index(
    source: Source, path: Path, read_shard: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """The tensors of all shards by name, in the order of the index.

    Args:
        source: the index.
        path: where it lies; the shards lie beside it.
        read_shard: gives the tensors of one shard.

    Raises:
        UnsupportedFormatError: JSON, but no such index.
        CorruptCheckpointError: a shard is missing, or has not the tensors that it should.
        UnsafeCheckpointError: a shard is said to lie elsewhere, or all together are too many.
    """
    check_limit(source.size, MAX_HEADER_BYTES, "bytes of an index")
    places = read_json(source.read(0, source.size), "the index").get("weight_map")
    if type(places) is not dict:
        raise UnsupportedFormatError("JSON, but no index of shards: it has no weight_map.")
    check_limit(len(places), MAX_TENSORS, "tensors")
    if any(type(place) is not str for place in places.values()):
        raise CorruptCheckpointError("Damaged: the index has a shard whose name is no text.")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for place in dict.fromkeys(places.values()):
        try:
            shards[place] = read_shard(beside(path.parent, place))
            check_limit(sum(map(len, shards.values())), MAX_TENSORS, "tensors")
        except CheckpointError as error:
            raise type(error)(f"Shard {place}: {error}") from None
    for name, place in places.items():
        if name not in shards[place]:
            raise CorruptCheckpointError(
                f"Shard {place}: {name!r:.200} is said to be in it, and is not."
            )
    return {name: shards[place][name] for name, place in places.items()}


def beside(folder: Path, name: str) -> Path:
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
