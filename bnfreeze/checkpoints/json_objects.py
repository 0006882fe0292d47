"""JSON that comes from a file: no name twice, no more of it than a checkpoint needs."""

from __future__ import annotations

import json
from typing import Any

from bnfreeze.errors import CorruptCheckpointError, UnsafeCheckpointError

__all__ = ["read_json"]


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
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise CorruptCheckpointError(f"Ambiguous: {what} has the name {key!r:.200} twice.")
            seen.add(key)
    return found
