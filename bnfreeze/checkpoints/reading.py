"""What every reader of a format gets, and what it gives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bnfreeze.checkpoints.source import FilePath, Source
from bnfreeze.checkpoints.zips import Entry, read_directory
from bnfreeze.errors import CorruptCheckpointError, UnsafeCheckpointError

__all__ = ["OpenFile", "read_json"]


@dataclass(eq=False)
class OpenFile:
    """A file that was opened for reading.

    Attributes:
        source: its bytes.
        path: where it lies.
        open_file: opens another file until this one is closed; None where there is no other.
    """

    source: Source
    path: FilePath
    open_file: Callable[[FilePath], OpenFile] | None = None
    _opened: dict[str, OpenFile] = field(default_factory=dict)

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
            raise CorruptCheckpointError(f"Damaged: '{name:.80}' is missing in it.")
        return self.entries[name]

    def beside(self, path: FilePath) -> OpenFile:
        """Another file, open as long as this one; the same for the same path.

        Raises:
            CheckpointError: it cannot be opened.
        """
        if self.open_file is None:
            raise CorruptCheckpointError("A part of a file that refers to other files.")
        if str(path) not in self._opened:
            self._opened[str(path)] = self.open_file(path)
        return self._opened[str(path)]


def read_json(data: bytes, what: str) -> dict[str, Any]:
    """The object that `data` holds.

    Raises:
        CorruptCheckpointError: no JSON, no object, or one with a name twice.
        UnsafeCheckpointError: nested too deep.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=lambda pairs: _unique(pairs, what))
    except RecursionError:
        raise UnsafeCheckpointError(f"Refused: {what} is nested too deep.") from None
    except ValueError as error:
        raise CorruptCheckpointError(f"Damaged: {what} is no JSON ({error}).") from None
    if type(value) is not dict:
        raise CorruptCheckpointError(f"Damaged: {what} is no JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise CorruptCheckpointError(f"Ambiguous: {what} has the name {name!r:.200} twice.")
    return found
