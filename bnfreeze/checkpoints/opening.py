"""A checkpoint opened: of whatever format, recognised by its content.

To add a format, write its reader in a module beside this one, and a line in `_FORMATS`. A reader
takes an `OpenFile` and returns a `Content`, or raises a `CheckpointError`: refused or damaged. What
is no checkpoint gets an error that names what it is.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Final

from bnfreeze.checkpoints.distributed import read_distributed
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.placeholders import naming_calls, placeholders_in
from bnfreeze.checkpoints.reading import OpenFile, naming_file
from bnfreeze.checkpoints.source import FilePath, RemotePath, Source, opened, plain_errors
from bnfreeze.checkpoints.state_dicts import StateDicts, find_state_dicts
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError

# The magic number of files of torch.save before torch 1.6, as their first pickle has it.
_LEGACY: Final = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
# The header of a pickle, or the beginning of one of protocol 0 or 1, which has none: a dict, a list
# or a name.
_PICKLE: Final = re.compile(
    rb"\x80[\1-\5]|\(d?p0\n|\(lp0\n|\(i|[}\]]q[\0\1]|c[A-Za-z_][\w.]*\n\w+\n"
)
# Of ONNX, the version of its representation, then its producer, its domain or its graph.
_ONNX: Final = re.compile(rb"\x08[\x01-\x20][\x10\x12\x1a\x20\x2a\x3a\x42]")


def _is_pickle(file: OpenFile) -> bool:
    return bool(_PICKLE.match(file.head))


def _is_safetensors(file: OpenFile) -> bool:
    # A header's size may begin as a pickle does; no pickle gives a size that fits the file.
    fits = int.from_bytes(file.head[:8], "little") <= file.source.size - 8
    return file.head[8:9] == b"{" and (fits or not _is_pickle(file))


# By name: the module and the function that read the format, imported when they are needed; and
# whether a file is of it. The first that matches is taken.
_FORMATS: Final[dict[str, tuple[str, Callable[[OpenFile], bool]]]] = {
    "safetensors": ("safetensors_file.read_safetensors", _is_safetensors),
    "TorchScript": ("torch_zip.read_torchscript", lambda file: "constants.pkl" in file.entries),
    "torch zip": (
        "torch_zip.read_torch_zip",
        lambda file: any(f"/{name}".endswith("/data.pkl") for name in file.entries),
    ),
    "torch.export": (
        "torch_zip.read_export",
        lambda file: (
            "serialized_state_dict.pt" in file.entries
            or any(name.startswith("data/weights/") for name in file.entries)
        ),
    ),
    "npz": (
        "numpy_arrays.read_npz",
        lambda file: bool(file.entries) and all(name.endswith(".npy") for name in file.entries),
    ),
    "torch legacy": (
        "torch_legacy.read_torch_legacy",
        lambda file: _is_pickle(file) and _LEGACY in file.head[:24],
    ),
    "pickle": ("torch_legacy.read_plain_pickle", _is_pickle),
    "shard index": ("safetensors_file.read_shards", lambda file: file.head.lstrip()[:1] == b"{"),
    "ONNX": ("onnx_file.read_onnx", lambda file: bool(_ONNX.match(file.head))),
}


class Checkpoint:
    """What a file, or a folder, holds.

    Attributes:
        path: where it lies, as it was named.
        kind: what it is, in the words of `_FORMATS`; or ``"distributed"``.
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
    names: list[str] | None = None
    remarks: tuple[str, ...] = ()
    with plain_errors("opened"):
        if place.is_dir():
            names = place.names() if isinstance(place, RemotePath) else os.listdir(place)
    if names is not None:
        if ".metadata" in names:
            return "distributed", read_distributed(place)
        name = _model_among(names)
        if name not in _MODEL_FILES:
            remarks = (f"Of the files in this folder, {name} was read.",)
        place /= name
    kind, content = read_file(OpenFile(stack.enter_context(opened(place)), place, stack))
    return kind, replace(content, remarks=(*remarks, *content.remarks))


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


def read_file(file: OpenFile) -> tuple[str, Content]:
    """The kind of a file, and what is in it.

    Raises:
        CorruptCheckpointError: empty, or nothing but zeros.
        UnsupportedFormatError: none of these kinds; says what it seems to be.
        CheckpointError: its reader refuses it.
    """
    if not file.head:
        raise CorruptCheckpointError("The file is empty.")
    for kind, (reader, matches) in _FORMATS.items():
        if matches(file):
            module, _, function = reader.rpartition(".")
            read = getattr(import_module(f"bnfreeze.checkpoints.{module}"), function)
            return kind, read(file)
    if file.entries:
        raise UnsupportedFormatError(_archive(file))
    if not file.head.strip(b"\0"):
        raise CorruptCheckpointError("It begins with zeros: it was not downloaded or copied whole.")
    for beginning, what in _OTHERS.items():
        if re.match(beginning, file.head):
            raise UnsupportedFormatError(what)
    raise UnsupportedFormatError(
        f"No checkpoint of a known kind: it begins with {file.head[:8].hex(' ')}. Known are "
        f"{', '.join(_FORMATS)}, and folders of torch.distributed.checkpoint and Hugging Face."
    )


# What else a file may be, by its beginning.
_OTHERS: Final = {
    rb"version https://git-lfs\.github\.com/spec/": "A Git LFS pointer, which stands for the "
    "checkpoint and does not hold it. Get the file with `git lfs pull`.",
    rb"(?i)\s*<(!doctype html|html|\?xml|head|body)": "A web page: what was downloaded is an error "
    "or a login, and no checkpoint. Open it in a browser to see what it asks for.",
    rb"(?s).{257}ustar": "A tar archive, as NeMo's .nemo is: unpack it with `tar -xf FILE`, and "
    "name the checkpoint in it.",
} | {
    beginning: f"No checkpoint: it is {what}."
    for beginning, what in {
        rb"\x1f\x8b": "compressed with gzip, as a .nemo or .tar.gz may be: unpack it first, with "
        "`tar -xzf FILE` or `gunzip FILE`",
        rb"\xfd7zXZ\0": "compressed with xz: unpack it first, with `unxz FILE`",
        rb"BZh": "compressed with bzip2: unpack it first, with `bunzip2 FILE`",
        rb"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first, with `unzstd FILE`",
        rb"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first, with `7z x FILE`",
        rb"Rar!": "a RAR archive: unpack it first, with `unrar x FILE`",
        rb"\x89HDF": "HDF5, as Keras writes it",
        rb"GGUF": "GGUF, which has no running statistics",
        rb"\x93NUMPY": "one NumPy array",
    }.items()
}


def _archive(file: OpenFile) -> str:
    """What to do with a zip file that holds something else."""
    inside = sorted(
        name
        for name in file.entries
        if name.endswith((".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".pkl"))
    )
    if not inside:
        return "A zip file, but none of torch.save: it has no data.pkl."
    maker = " of Stable-Baselines3" if "policy.pth" in inside else ""
    shown = ", ".join(f"{name:.100}" for name in inside[:4])
    return (
        f"A zip archive{maker} with checkpoints in it ({shown}): unpack it with `unzip FILE`, and "
        f"name one of them."
    )
