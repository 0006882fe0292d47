"""Bytes of a file, by position: checked to be there before they are read, and never changed.

A file on a server is read by ranges, through fsspec, and never downloaded whole: of a checkpoint
its directory is read, its description, and the bytes of the norm layers.
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final, cast

from bnfreeze.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsupportedFormatError,
    damaged,
)

# What is fetched beyond what is asked for: the tensors of a layer lie together.
_AHEAD: Final = 1 << 13


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
        with plain_errors("opened"):
            return dict(self._system.info(self._name))

    def is_dir(self) -> bool:
        """Whether it is a folder; a page of a web server is none."""
        return (
            not self.url.startswith(("http:", "https:")) and self._info.get("type") == "directory"
        )

    def names(self) -> list[str]:
        """The names of what is in it."""
        with plain_errors("opened"):
            paths = self._system.ls(self._name, detail=False)
        return [str(path).rstrip("/").rpartition("/")[2] for path in paths]

    def open(self) -> tuple[IO[bytes], int]:
        """Open it for reading by ranges, and say its size in bytes.

        Raises:
            UnsupportedFormatError: the server gives no ranges.
        """
        size = self._info.get("size")
        if type(size) is not int or self._info.get("partial") is False:
            raise UnsupportedFormatError(
                "The server does not give parts of the file: download it, and name the copy."
            )
        file = self._system.open(self._name, block_size=_AHEAD, cache_type="readahead")
        return cast("IO[bytes]", file), size


@contextmanager
def plain_errors(what: str = "read") -> Iterator[None]:
    """Let whatever goes wrong with a file come out as a `CheckpointError`."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    # Every kind of server has errors of its own, of no common class.
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError)
        why = "there is no such file" if is_missing else str(error) or type(error).__name__
        why = getattr(error, "strerror", None) or why
        raise CheckpointError(f"Cannot be {what}: {why:.300}.") from None


FilePath = Path | RemotePath


class Source:
    """A range of a file that is read by position.

    Reading rather than mapping: a map dies with a signal where the file shrinks meanwhile, and
    its pages count as the reader's memory.
    """

    def __init__(
        self,
        file: IO[bytes] | FilePath,
        start: int | Callable[[], int],
        size: int,
        *,
        checksum: int | None = None,
    ) -> None:
        """Take `size` bytes of an open file from `start`, which may be found out when needed.

        Args:
            file: by its path, it is opened anew for each read: of some there are thousands.
            start: where they begin.
            size: how many they are.
            checksum: the CRC-32 of all of them, as far as the file has one.
        """
        self._file = file
        self._start = start
        self.size = size
        self._checksum = checksum
        # The CRC-32 of what stands before them, where the checksum is that of both.
        self._before = 0

    @classmethod
    def of(cls, data: bytes) -> Source:
        """Bytes that are in memory already."""
        return cls(io.BytesIO(data), 0, len(data))

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Exactly `length` bytes from `offset`, or all, which are checked against the checksum.

        Raises:
            CorruptCheckpointError: they do not lie in the range, or the file has shrunk meanwhile.
        """
        length = self.size if length is None else length
        start = self._place(offset, length)
        if isinstance(self._file, (Path, RemotePath)):
            with opened(self._file) as whole:
                return whole.read(start, length)
        with plain_errors():
            self._file.seek(start)
            data = self._file.read(length)
        if len(data) != length:
            raise CorruptCheckpointError("The file became shorter while it was read.")
        is_checked = self._checksum is not None and length == self.size
        if is_checked and zlib.crc32(data, self._before) != self._checksum:
            raise damaged("bytes in it do not match the checksum stored with them.")
        return data

    def later(self, place: Callable[[], int], size: int, checksum: int | None = None) -> Source:
        """A range of this range whose place is found out when it is first read."""
        return Source(self._file, lambda: self._place(place(), size), size, checksum=checksum)

    def identity(self) -> object:
        """The same for the same file, whatever name it was opened under."""
        try:
            status = os.fstat(cast("IO[bytes]", self._file).fileno())
        except (OSError, AttributeError):  # it has no descriptor: it is on a server
            return id(self._file)
        return status.st_dev, status.st_ino

    def head(self, length: int) -> bytes:
        """The first bytes, as many as there are."""
        return self.read(0, min(length, self.size))

    def part(self, offset: int, length: int) -> Source:
        """A range of this range.

        Raises:
            CorruptCheckpointError: it is not inside.
        """
        return Source(self._file, self._place(offset, length), length)

    def after(self, header: int) -> Source:
        """What follows after a header of so many bytes; the checksum stays that of both."""
        rest = self.part(header, self.size - header)
        rest._checksum, rest._before = self._checksum, zlib.crc32(self.read(0, header))
        return rest

    def _place(self, offset: int, length: int) -> int:
        """Where in the file a range of this range begins."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CorruptCheckpointError(
                f"Damaged or truncated: {length:,} bytes are said to lie at {offset:,}, "
                f"and there are {self.size:,} in all."
            )
        if callable(self._start):
            self._start = self._start()
        return self._start + offset


@contextmanager
def opened(path: FilePath) -> Iterator[Source]:
    """Open a regular file for reading, or a file on a server.

    Raises:
        CheckpointError: it cannot be opened.
        UnsupportedFormatError: it is no regular file: reading a pipe or a device may never end.
    """
    with plain_errors("opened"):
        if isinstance(path, RemotePath):
            file, size = path.open()
        else:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UnsupportedFormatError("Not a regular file.")
            file = open(path, "rb")  # noqa: SIM115 - closed below
            size = os.fstat(file.fileno()).st_size
    with file:
        yield Source(file, 0, size)
