"""What every reader of a format gets."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from bnfreeze.checkpoints.source import FilePath, Source, opened
from bnfreeze.checkpoints.zips import Entry, read_directory
from bnfreeze.errors import (
    BnfreezeError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
    damaged,
)


@dataclass(eq=False)
class OpenFile:
    """A file that was opened for reading, or a part of one.

    Attributes:
        source: its bytes.
        path: where it lies; None of a part, which must not refer to other files.
        stack: closes the files that are opened for it.
    """

    source: Source
    path: FilePath | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    _others: dict[str, OpenFile] = field(default_factory=dict)

    @cached_property
    def head(self) -> bytes:
        """The first bytes, as many as there are."""
        return self.source.head(1024)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The entries of a zip file by name, without the archive's own folder at the top.

        There are none where it is no zip file.

        Raises:
            CheckpointError: it is no sound zip file.
        """
        if not self.head.startswith(b"PK\3\4"):
            return {}
        found = read_directory(self.source)
        folders = {name.partition("/")[0] for name in found}
        if len(folders) != 1 or any("/" not in name for name in found):
            return found
        return {name.partition("/")[2]: entry for name, entry in found.items()}

    def entry(self, name: str) -> Entry:
        """An entry of a zip file that must be there.

        Raises:
            CorruptCheckpointError: it is not.
        """
        if name not in self.entries:
            raise damaged(f"'{name:.80}' is missing in it.")
        return self.entries[name]

    def beside(self, name: str) -> OpenFile:
        """A file beside this one, open as long as this one; the same for the same name.

        Raises:
            CheckpointError: it cannot be opened.
        """
        if self.path is None:
            raise UnsupportedFormatError("A part, as a shard of an index, that refers to others.")
        if name not in self._others:
            source = self.stack.enter_context(opened(path_beside(self.path.parent, name)))
            # Without a path: two indexes that name each other would have no end.
            self._others[name] = OpenFile(source)
        return self._others[name]


def path_beside(folder: FilePath, name: str) -> FilePath:
    """The path of a file that another file names: a plain name, and so beside it.

    Raises:
        UnsafeCheckpointError: anything but a plain name.
    """
    plain = all(kind(name).name == name for kind in (PurePosixPath, PureWindowsPath))
    if not plain or name in {"", ".", ".."} or "\0" in name:
        raise UnsafeCheckpointError(
            f"Refused: it refers to {name!r:.200}, and not to a file beside it."
        )
    return folder / name


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the package that comes out say which file or tensor it is about."""
    try:
        yield
    except BnfreezeError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise type(error)(f"{path}: {error}") from None


def read_json(data: bytes, what: str) -> dict[str, Any]:
    """The object that `data` holds.

    Raises:
        CorruptCheckpointError: no JSON, no object, or one with a name twice.
        UnsafeCheckpointError: nested too deep.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise CorruptCheckpointError(f"Ambiguous: {what} has the name {name!r:.200} twice.")
        return found

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise UnsafeCheckpointError(f"Refused: {what} is nested too deep.") from None
    except ValueError as error:
        raise damaged(f"{what} is no JSON ({error}).") from None
    if type(value) is not dict:
        raise damaged(f"{what} is no JSON object.")
    return value
