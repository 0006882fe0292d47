"""A checkpoint opened: of whatever format, by its content."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from bnfreeze.checkpoints.distributed import read_distributed
from bnfreeze.checkpoints.kinds import read_file
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.placeholders import naming_calls, placeholders_in
from bnfreeze.checkpoints.reading import OpenFile, naming_file
from bnfreeze.checkpoints.remote import RemotePath, plain_errors
from bnfreeze.checkpoints.source import FilePath, Source, opened
from bnfreeze.checkpoints.state_dicts import StateDicts, find_state_dicts
from bnfreeze.errors import UnsupportedFormatError

__all__ = ["Checkpoint", "open_checkpoint"]


class Checkpoint:
    """What a file, or a folder, holds.

    Attributes:
        path: where it lies, as it was named.
        kind: what it is: ``"torch zip"``, ``"torch legacy"``, ``"TorchScript"``,
            ``"torch.export"``, ``"pickle"``, ``"npz"``, ``"safetensors"``, ``"shard index"``,
            ``"ONNX"`` or ``"distributed"``.
        root: what was saved: dicts, lists, placeholders, and a `StoredTensor` for each tensor.
        remarks: sentences about the file that a person should read.
        uninterpreted: the objects that were left as placeholders, each class once.
        calls: what loading it would call that is not known to be harmless, the worst first.
    """

    def __init__(self, path: str, kind: str, content: Content) -> None:
        """Take what was read."""
        self.path = path
        self.kind = kind
        self.root = content.root
        self.remarks = content.remarks
        self.uninterpreted, self.calls = placeholders_in(content)
        self._made = content.made

    def chosen(self, key: str | None = None) -> StateDicts:
        """The state_dict under a key alone; all, with norm layers or without, if there is no key.

        Raises:
            UnsupportedFormatError: there is none of that name, or there are several.
        """
        with naming_file(self.path):
            with naming_calls(self._made):
                found = find_state_dicts(self.root)
            return found.chosen(key)


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Open a checkpoint of any format; its tensors can be read inside the ``with`` block.

    Args:
        path: a file or a folder; as a string also a URL (``https://…``, ``hf://…``, ``s3://…``),
            which is read by ranges, or ``"-"`` for standard input.

    Raises:
        CheckpointError: it cannot be read (the class says why); nothing of it was run.
    """
    with ExitStack() as stack:
        with naming_file(path):
            kind, content = _read(path, stack)
        yield Checkpoint(os.fspath(path), kind, content)


def _read(path: str | os.PathLike[str], stack: ExitStack) -> tuple[str, Content]:
    if path == "-":
        # Copied, because readers go back and forth.
        file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        shutil.copyfileobj(sys.stdin.buffer, file)
        return read_file(OpenFile(Source(file, 0, file.tell())))
    is_url = isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.:-]+://", path)
    place: FilePath = RemotePath(str(path)) if is_url else Path(path)
    with plain_errors("opened"):
        is_folder = place.is_dir()
        names = sorted(file.name for file in place.iterdir()) if is_folder else []
    if ".metadata" in names:
        return "distributed", read_distributed(place)
    if is_folder:
        place /= _model_among(names)
    return read_file(OpenFile(stack.enter_context(opened(place)), place, stack))


# What the folders of Hugging Face's libraries are made of, in the order in which they look.
_MODEL_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.index.json",
    "*.safetensors",
)


def _model_among(names: list[str]) -> str:
    """The file in a folder that has its model."""
    for pattern in _MODEL_FILES:
        found = fnmatch.filter(names, pattern)
        if len(found) == 1:
            return found[0]
    raise UnsupportedFormatError(
        "A folder without .metadata, model.safetensors or pytorch_model.bin, and so neither of "
        "torch.distributed.checkpoint nor of Hugging Face. Name a file in it."
    )
