"""Bytes of a file, by position: checked to be there before they are read, and never changed."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from bnfreeze.checkpoints.remote import RangedFile, RemotePath
from bnfreeze.errors import CheckpointError, CorruptCheckpointError, UnsupportedFormatError

__all__ = ["FilePath", "Source", "opened"]

FilePath = Path | RemotePath


class Source:
    """A range of a file that is read by position.

    Reading rather than mapping: a map dies with a signal where the file shrinks meanwhile, and
    its pages count as the reader's memory.
    """

    def __init__(
        self, file: BinaryIO | RangedFile | FilePath, start: int | Callable[[], int], size: int
    ) -> None:
        """Take `size` bytes of an open file from `start`, which may be found out when needed.

        By its path, the file is opened anew for each read: of some there are thousands.
        """
        self._file = file
        self._start = start
        self.size = size

    @classmethod
    def of(cls, data: bytes) -> Source:
        """Bytes that are in memory already."""
        return cls(io.BytesIO(data), 0, len(data))

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`.

        Raises:
            CorruptCheckpointError: they do not lie in the range, or the file has shrunk meanwhile.
        """
        start = self._place(offset, length)
        if isinstance(self._file, (Path, RemotePath)):
            with opened(self._file) as whole:
                return whole.read(start, length)
        try:
            self._file.seek(start)
            data = self._file.read(length)
        except OSError as error:
            raise CheckpointError(f"Cannot be read: {error.strerror}.") from None
        if len(data) != length:
            raise CorruptCheckpointError("The file became shorter while it was read.")
        return data

    def later(self, place: Callable[[], int], size: int) -> Source:
        """A range of this range whose place is found out when it is first read."""
        return Source(self._file, lambda: self._place(place(), size), size)

    def identity(self) -> tuple[int, int]:
        """The same for the same file, whatever name it was opened under."""
        if isinstance(self._file, RangedFile):
            return self._file.identity
        status = os.fstat(cast("BinaryIO", self._file).fileno())
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
    if isinstance(path, RemotePath):
        ranged = path.open()
        yield Source(ranged, 0, ranged.size)
        return
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnsupportedFormatError("Not a regular file.")
        file = open(path, "rb")  # noqa: SIM115 - closed below; an error in the block is not ours
    except ValueError:
        raise CheckpointError("Not the name of a file.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot be opened: {error.strerror}.") from None
    with file:
        yield Source(file, 0, os.fstat(file.fileno()).st_size)
