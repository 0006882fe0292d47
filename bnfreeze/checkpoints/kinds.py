"""The formats that are read, recognised by their content; and what else a file may be.

To add a format, write its reader in a module beside this one, and a line in `_FORMATS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Final

from bnfreeze.checkpoints.reading import Content, OpenFile
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError

__all__ = ["read_file"]


@dataclass(frozen=True)
class _Format:
    """A format of files.

    Attributes:
        kind: what it is called.
        reader: the module and the function that read it, imported when they are needed.
        matches: whether a file is of this format; the first that matches is taken.
    """

    kind: str
    reader: str
    matches: Callable[[OpenFile], bool]


# The magic number of files of torch.save before torch 1.6, as their first pickle has it.
_LEGACY: Final = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
# The beginning of a pickle of protocol 0 or 1, which has no header: a dict, a list or a name.
_OLD_PICKLE: Final = re.compile(rb"\(d?p0\n|\(lp0\n|\(i|[}\]]q[\0\1]|c[A-Za-z_][\w.]*\n\w+\n")
# Of ONNX, the version of its representation, then its producer, its domain or its graph.
_ONNX: Final = re.compile(rb"\x08[\x01-\x20][\x10\x12\x1a\x20\x2a\x3a\x42]")


def _is_pickle(file: OpenFile) -> bool:
    header = file.head[:1] == b"\x80" and file.head[1:2] in (b"\1", b"\2", b"\3", b"\4", b"\5")
    return header or bool(_OLD_PICKLE.match(file.head))


def _is_safetensors(file: OpenFile) -> bool:
    # A header's size may begin as a pickle does; no pickle gives a size that fits the file.
    fits = int.from_bytes(file.head[:8], "little") <= file.source.size - 8
    return file.head[8:9] == b"{" and (fits or not _is_pickle(file))


def _is_export(file: OpenFile) -> bool:
    return "serialized_state_dict.pt" in file.names or any(
        name.startswith("data/weights/") for name in file.names
    )


_FORMATS: Final = (
    _Format("safetensors", "safetensors_file.read_safetensors", _is_safetensors),
    _Format(
        "TorchScript", "torch_zip.read_torchscript", lambda file: "constants.pkl" in file.names
    ),
    _Format(
        "torch zip",
        "torch_zip.read_torch_zip",
        lambda file: any(f"/{name}".endswith("/data.pkl") for name in file.names),
    ),
    _Format("torch.export", "torch_export.read_export", _is_export),
    _Format(
        "npz",
        "npz.read_npz",
        lambda file: bool(file.names) and all(name.endswith(".npy") for name in file.names),
    ),
    _Format(
        "torch legacy",
        "torch_legacy.read_torch_legacy",
        lambda file: _is_pickle(file) and _LEGACY in file.head[:24],
    ),
    _Format("pickle", "torch_legacy.read_plain_pickle", _is_pickle),
    _Format("shard index", "shards.read_shards", lambda file: file.head.lstrip()[:1] == b"{"),
    _Format("ONNX", "onnx_file.read_onnx", lambda file: bool(_ONNX.match(file.head))),
)


def read_file(file: OpenFile, *, shard: bool = False) -> tuple[str, Content]:
    """The kind of a file, and what is in it.

    Args:
        file: any file.
        shard: whether an index names it. An index is refused then, before it is read: two that
            name each other would have no end.

    Raises:
        CorruptCheckpointError: empty, or nothing but zeros.
        UnsupportedFormatError: none of these kinds; says what it seems to be.
        CheckpointError: its reader refuses it.
    """
    if not file.head:
        raise CorruptCheckpointError("The file is empty.")
    for known in _FORMATS:
        if known.matches(file):
            if shard and known.kind == "shard index":
                raise UnsupportedFormatError("An index, where a file with tensors should be.")
            module, _, function = known.reader.rpartition(".")
            reader = getattr(import_module(f"bnfreeze.checkpoints.{module}"), function)
            content: Content = reader(file)
            return known.kind, content
    if file.names:
        raise UnsupportedFormatError(_archive(file))
    if not file.head.strip(b"\0"):
        raise CorruptCheckpointError("It begins with zeros: it was not downloaded or copied whole.")
    raise UnsupportedFormatError(_other(file.head))


_OTHERS: Final = {
    b"\x1f\x8b": "compressed with gzip, as a .nemo or .tar.gz may be: unpack it first, with "
    "`tar -xzf FILE` or `gunzip FILE`",
    b"\xfd7zXZ\0": "compressed with xz: unpack it first, with `unxz FILE`",
    b"BZh": "compressed with bzip2: unpack it first, with `bunzip2 FILE`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first, with `unzstd FILE`",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first, with `7z x FILE`",
    b"Rar!": "a RAR archive: unpack it first, with `unrar x FILE`",
    b"\x89HDF": "HDF5, as Keras writes it",
    b"GGUF": "GGUF, which has no running statistics",
    b"\x93NUMPY": "one NumPy array",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF",
    b"#!": "a script",
}


def _archive(file: OpenFile) -> str:
    """What to do with a zip file that holds something else."""
    inside = sorted(
        name
        for name in file.names
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


def _other(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return (
            "A Git LFS pointer, which stands for the checkpoint and does not hold it. "
            "Get the file with `git lfs pull`."
        )
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<body")):
        return (
            "A web page: what was downloaded is an error or a login, and no checkpoint. "
            "Open it in a browser to see what it asks for."
        )
    if head[257:262] == b"ustar":
        return (
            "A tar archive, as NeMo's .nemo is: unpack it with `tar -xf FILE`, and name the "
            "checkpoint in it."
        )
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            return f"No checkpoint: it is {what}."
    return (
        f"No checkpoint of a known kind: it begins with {head[:8].hex(' ')}. Known are "
        f"{', '.join(known.kind for known in _FORMATS)}, and folders of "
        f"torch.distributed.checkpoint and Hugging Face."
    )
