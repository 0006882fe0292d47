"""Files on servers, read by ranges through fsspec.

Nothing is downloaded whole: of a checkpoint its directory is read, its description, and the bytes
of the norm layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import IO, Any, Final, cast

from bnfreeze.errors import CheckpointError, UnsupportedFormatError

__all__ = ["RemotePath", "plain_errors"]

# What is fetched beyond what is asked for: the tensors of a layer lie together.
_AHEAD: Final = 1 << 12


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
    def name(self) -> str:
        """The last part of it."""
        return self.url.rpartition("/")[2]

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

    def iterdir(self) -> Iterator[RemotePath]:
        """What is in it."""
        with plain_errors("opened"):
            names = self._system.ls(self._name, detail=False)
        for name in names:
            yield self / str(name).rstrip("/").rpartition("/")[2]

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


@contextlib.contextmanager
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
