"""Which kind of file this is, by its content; and in plain words, what else it may be."""

from __future__ import annotations

from typing import Final, Literal

from bnfreeze.checkpoints.source import Source
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError

__all__ = ["Kind", "kind_of"]

Kind = Literal["torch zip", "torch legacy", "safetensors", "shard index"]

_OTHERS: Final = {
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\xfd7zXZ\0": "compressed with xz: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\x89HDF": "HDF5, as Keras writes it",
    b"GGUF": "GGUF, which has no running statistics",
    b"\x93NUMPY": "a NumPy array",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF",
    b"#!": "a script",
}


def kind_of(source: Source) -> Kind:
    """Tell the kind from the first bytes.

    Raises:
        CorruptCheckpointError: empty, or nothing but zeros.
        UnsupportedFormatError: none of these kinds; says what it seems to be.
    """
    head = source.head(1024)
    if not head:
        raise CorruptCheckpointError("The file is empty.")
    if head.startswith(b"PK\3\4"):
        return "torch zip"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "torch legacy"
    if head[8:9] == b"{" and len(head) > 8:
        return "safetensors"
    if head.lstrip()[:1] == b"{":
        return "shard index"
    if not head.strip(b"\0"):
        raise CorruptCheckpointError("It begins with zeros: it was not downloaded or copied whole.")
    raise UnsupportedFormatError(_other(head))


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
            "A tar archive. If torch 0.1 wrote it: load it where you trust it, and save it again."
        )
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            return f"No checkpoint: it is {what}."
    return (
        f"No checkpoint of a known kind: it begins with {head[:8].hex(' ')}. Known are files of "
        f"torch.save, safetensors, *.index.json, and folders of torch.distributed.checkpoint."
    )
