"""Files on servers, read by ranges through fsspec; and standard input.

Nothing is downloaded whole: of a checkpoint its directory is read, its description, and the bytes
of the norm layers.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from typing import Any, BinaryIO, Final, cast

from bnfreeze.errors import CheckpointError, CorruptCheckpointError, UnsupportedFormatError

__all__ = ["RangedFile", "RemotePath", "is_remote", "standard_input"]

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]+://")
# What is fetched at least, and how much of it is kept: the tensors of a layer lie together.
_BLOCK: Final = 1 << 12
_KEPT: Final = 512


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as ``https://…``, ``hf://…`` or ``s3://…``."""
    return _SCHEME.match(path) is not None


class RemotePath:
    """A URL, with the few methods of `pathlib.Path` that readers use."""

    def __init__(self, url: str) -> None:
        """Take a URL.

        Raises:
            UnsupportedFormatError: fsspec, or what it needs for this kind of URL, is missing.
        """
        self.url = url.rstrip("/")
        if "::" in url or url.lower().startswith("file:"):
            raise UnsupportedFormatError("Not a plain URL: name the file itself.")
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise UnsupportedFormatError(
                "To read a URL, install the extra `remote`: pip install 'bnfreeze[remote]'."
            ) from None
        try:
            self._system, self._name = cast("tuple[Any, str]", url_to_fs(self.url))
        except ImportError as error:
            raise UnsupportedFormatError(f"To read this kind of URL: {error}.") from None
        except ValueError as error:
            raise UnsupportedFormatError(f"Not a URL that fsspec knows: {error}.") from None

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def parent(self) -> RemotePath:
        """What it lies in."""
        return RemotePath(self.url.partition("?")[0].rpartition("/")[0])

    @cached_property
    def _info(self) -> dict[str, Any]:
        with _plain_errors():
            return dict(self._system.info(self._name))

    def is_dir(self) -> bool:
        """Whether it is a folder; a page of a web server is none."""
        return (
            not self.url.startswith(("http:", "https:")) and self._info.get("type") == "directory"
        )

    def exists(self) -> bool:
        """Whether there is something."""
        with _plain_errors():
            return bool(self._system.exists(self._name))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """The files in it whose names match."""
        with _plain_errors():
            names = self._system.glob(f"{self._name}/{pattern}")
        for name in names:
            yield self / str(name).rpartition("/")[2]

    def open(self) -> RangedFile:
        """Open it for reading by ranges.

        Raises:
            CheckpointError: it is not there, or the server gives no ranges.
        """
        info = self._info
        if type(info.get("size")) is not int or info.get("partial") is False:
            raise UnsupportedFormatError(
                "The server does not give parts of the file: download it, and name the copy."
            )
        return RangedFile(self._system, self._name, info["size"])


class RangedFile:
    """A file on a server, as far as `Source` needs one.

    Attributes:
        size: of the file, in bytes.
        identity: the same for the same file.
    """

    def __init__(self, system: Any, name: str, size: int) -> None:
        """Take a file system of fsspec, a name in it, and the file's size."""
        self.size = size
        self.identity = (hash(name), size)
        self._system = system
        self._name = name
        self._at = 0
        self._blocks: dict[int, bytes] = {}

    def seek(self, position: int) -> None:
        """Go to a position."""
        self._at = position

    def read(self, length: int) -> bytes:
        """The next bytes.

        Raises:
            CheckpointError: the server gave others than were asked for.
        """
        start, end = self._at, min(self._at + length, self.size)
        self._at = end
        if start >= end:
            return b""
        blocks = range(start // _BLOCK, -(-end // _BLOCK))
        if len(blocks) > _KEPT // 2:
            return self._fetch(start, end)
        missing = [block for block in blocks if block not in self._blocks]
        if missing:
            first, last = missing[0], missing[-1]
            begin = first * _BLOCK
            data = self._fetch(begin, min((last + 1) * _BLOCK, self.size))
            for block in range(first, last + 1):
                self._blocks[block] = data[block * _BLOCK - begin : (block + 1) * _BLOCK - begin]
        found = b"".join(self._blocks[block] for block in blocks)
        while len(self._blocks) > _KEPT:
            del self._blocks[next(iter(self._blocks))]
        return found[start - blocks[0] * _BLOCK : end - blocks[0] * _BLOCK]

    def _fetch(self, start: int, end: int) -> bytes:
        with _plain_errors():
            data = bytes(self._system.cat_file(self._name, start=start, end=end))
        if len(data) != end - start:
            raise CorruptCheckpointError(
                f"The server gave {len(data):,} bytes, and {end - start:,} were asked for: "
                f"download the file, and name the copy."
            )
        return data


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError("Cannot be opened: there is no such file.") from None
    # Every kind of server has errors of its own, of no common class.
    except Exception as error:
        what = str(error) or type(error).__name__
        raise CheckpointError(f"Cannot be read from the server: {what:.300}") from None


@contextlib.contextmanager
def standard_input() -> Iterator[BinaryIO]:
    """Standard input, copied to a temporary file, because readers go back and forth."""
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        yield file
