"""A checkpoint opened: of whatever kind, by its content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfreeze.checkpoints.distributed import read_distributed
from bnfreeze.checkpoints.kinds import kind_of
from bnfreeze.checkpoints.shards import read_index
from bnfreeze.checkpoints.source import Source, opened
from bnfreeze.checkpoints.state_dicts import StateDict, find_state_dict
from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.checkpoints.torch_legacy import read_torch_legacy
from bnfreeze.checkpoints.torch_zip import read_torch_zip
from bnfreeze.errors import (
    BnfreezeError,
    CheckpointError,
    CorruptCheckpointError,
    UnsupportedFormatError,
)

__all__ = ["Checkpoint", "open_checkpoint", "telling"]


@dataclass(frozen=True)
class Checkpoint:
    """What a file, or a folder, holds.

    Attributes:
        path: where it lies.
        kind: ``"torch zip"``, ``"torch legacy"``, ``"safetensors"``, ``"shard index"`` or
            ``"distributed"``.
        root: what was saved: dicts, lists, and a `StoredTensor` for each tensor.
    """

    path: Path
    kind: str
    root: Any

    def state_dict(self, key: str | None = None) -> StateDict:
        """The state_dict in it; of several the one that `key` names.

        Raises:
            UnsupportedFormatError: there is none, or none of that name.
        """
        with telling(self.path):
            return find_state_dict(self.root, key)


@contextmanager
def telling(path: Path | str) -> Iterator[None]:
    """Let an error of the package that comes out of the block say which file or tensor it is about."""
    try:
        yield
    except BnfreezeError as error:
        raise type(error)(f"{path}: {error}") from None


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Open a checkpoint of any kind; its tensors can be read inside the ``with`` block.

    Raises:
        CheckpointError: it cannot be read (the class says why); nothing of it was run.
    """
    path = Path(path)
    with ExitStack() as stack:
        with telling(path):
            kind, root = _read(path, stack)
        yield Checkpoint(path, kind, root)


def _read(path: Path, stack: ExitStack) -> tuple[str, Any]:
    def open_file(file: Path) -> Source:
        return stack.enter_context(opened(file))

    try:
        if path.is_dir():
            if (path / ".metadata").exists():
                return "distributed", read_distributed(path)
            path = _index_in(path)
    except OSError as error:
        raise CheckpointError(f"Cannot be opened: {error.strerror}.") from None
    source = open_file(path)
    kind = kind_of(source)
    if kind != "shard index":
        return kind, _read_file(kind, source, path)
    seen: set[tuple[int, int]] = set()

    def read_shard(shard: Path) -> dict[str, StoredTensor]:
        part = open_file(shard)
        # However it is named: reading one file again and again could go on for ever.
        if part.identity() in seen:
            raise CorruptCheckpointError("It is the same file as another shard.")
        seen.add(part.identity())
        return _flat(part, shard)

    return kind, read_index(source, path, read_shard)


def _index_in(folder: Path) -> Path:
    indexes = sorted(folder.glob("*.index.json"))
    if len(indexes) != 1:
        raise UnsupportedFormatError(
            "A folder without .metadata, and so none of torch.distributed.checkpoint. "
            "Name a file in it."
        )
    return indexes[0]


def _read_file(kind: str, source: Source, path: Path) -> Any:
    if kind == "torch zip":
        return read_torch_zip(source)
    if kind == "torch legacy":
        return read_torch_legacy(source)
    # Here, because the other kinds do without the library.
    from bnfreeze.checkpoints.safetensors_file import read_safetensors

    return read_safetensors(source, path)


def _flat(source: Source, path: Path) -> dict[str, StoredTensor]:
    """The tensors of one shard."""
    kind = kind_of(source)
    if kind == "shard index":
        raise UnsupportedFormatError("An index, where a file with tensors should be.")
    root = _read_file(kind, source, path)
    found = root.named() if hasattr(root, "named") else root
    if not isinstance(found, dict):
        raise CheckpointError("It holds no tensors by name.")
    return {name: value for name, value in found.items() if isinstance(value, StoredTensor)}
