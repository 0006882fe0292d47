"""A snapshot as a file: safetensors with the values, or JSON with the digests. Needs no torch."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bnfreeze.checkpoints import StoredTensor, open_checkpoint
from bnfreeze.checkpoints.stored_tensor import ITEM_SIZES
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError
from bnfreeze.files import replacement
from bnfreeze.verification.facts import Facts
from bnfreeze.verification.state import State
from bnfreeze.verification.values import KeptTensor

__all__ = ["load", "save"]

_FORMAT = "bnfreeze-snapshot"
_SCHEMA = 1
_KEY = "bnfreeze"
# In bytes; each tensor takes some 600.
_MOST_DIGESTS = 256 << 20

# What every version of safetensors knows; values of another dtype are written as their bytes.
_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def save(state: State, path: Path) -> None:
    """Write the state to `path`: to a new file beside it first, which then takes its name."""
    header = {"format": _FORMAT, "schema": _SCHEMA, "facts": state.facts.to_dict()}
    with replacement(path) as fresh:
        if state.digests:
            text = json.dumps({**header, "sha256": dict(state.digests)}, indent=1)
            fresh.write_text(text, encoding="utf-8")
        else:
            _write_safetensors(state.values, fresh, {_KEY: json.dumps(header)})


def _write_safetensors(
    values: Mapping[str, StoredTensor], path: Path, metadata: Mapping[str, str]
) -> None:
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, value in values.items():
        if value.dtype not in ITEM_SIZES:
            raise UnsupportedFormatError(
                f"{name} has the dtype {value.dtype}, which cannot be written. Take the snapshot "
                f"with digest=True, or leave it out with tensors=…"
            )
        size = value.numel * ITEM_SIZES[value.dtype]
        known = value.dtype in _CODES
        described[name] = {
            "dtype": _CODES.get(value.dtype, "U8"),
            "shape": list(value.shape) if known else [size],
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values.values():
            for piece in value.pieces():
                file.write(piece.data)


def load(path: Path) -> State:
    """Read what `save` wrote; the content says which of the two forms it is."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UnsupportedFormatError(f"{path} is not a snapshot: it is not a regular file.")
    with path.open("rb") as stream:
        start = stream.read(9)
    if start.lstrip().startswith(b"{"):
        return _load_digests(path)
    if len(start) == 9 and start[8:] == b"{":
        return _load_values(path)
    raise UnsupportedFormatError(
        f"{path} is not a snapshot: neither safetensors nor JSON. Snapshot.save writes one of "
        f"a model, and `bnfreeze snapshot` one of a checkpoint."
    )


def _load_digests(path: Path) -> State:
    if path.stat().st_size > _MOST_DIGESTS:
        raise _corrupt(path, "it is larger than any list of digests")
    try:
        header = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"it is not valid JSON ({error})") from error
    facts = _facts(path, header)
    digests = header.get("sha256")
    if not isinstance(digests, dict) or not all(_is_digest(value) for value in digests.values()):
        raise _corrupt(path, "it has no list of SHA-256 digests")
    _check_names(path, facts, digests, set(facts.tensors))
    return State(facts, {}, digests)


def _load_values(path: Path) -> State:
    with open_checkpoint(path) as opened:
        stored = opened.root if isinstance(opened.root, dict) else {}
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            text = json.loads(stream.read(size)).get("__metadata__", {}).get(_KEY)
        if text is None:
            raise UnsupportedFormatError(
                f"{path} is a safetensors file, but not a snapshot: it lacks the facts that "
                f"Snapshot.save writes. `bnfreeze snapshot` makes a snapshot of a checkpoint."
            )
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _corrupt(path, f"its facts are not valid JSON ({error})") from error
        facts = _facts(path, header)
        _check_names(path, facts, stored, {fact.first for fact in facts.tensors.values()})
        return State(facts, {name: _typed(path, name, stored[name], facts) for name in stored})


def _facts(path: Path, header: Any) -> Facts:
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise UnsupportedFormatError(f"{path} is not a snapshot: Snapshot.save writes one.")
    if header.get("schema") != _SCHEMA:
        raise UnsupportedFormatError(
            f"{path} is a snapshot of schema {header.get('schema')!r:.20}, and this version of "
            f"bnfreeze reads schema {_SCHEMA}: use the version that wrote it, or a later one."
        )
    try:
        return Facts.from_dict(header["facts"])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise _corrupt(path, f"its facts are incomplete ({error!r:.200})") from error


def _check_names(path: Path, facts: Facts, stored: Mapping[str, Any], wanted: set[str]) -> None:
    """Every readable tensor has its values, and nothing else has."""
    wanted = {name for name in wanted if not facts.tensors[name].unreadable}
    missing, extra = sorted(wanted - stored.keys()), sorted(stored.keys() - wanted)
    if missing:
        raise _corrupt(path, f"{missing[0]} is noted, but its values are missing")
    if extra:
        raise _corrupt(path, f"there are values of {extra[0]}, which is not noted")


def _typed(path: Path, name: str, stored: StoredTensor, facts: Facts) -> KeptTensor:
    """The stored values in the dtype and shape that the facts say."""
    noted = facts.tensors[name]
    if noted.dtype not in ITEM_SIZES:
        raise UnsupportedFormatError(
            f"{path}: {name} has the dtype {noted.dtype!r:.40}, which bnfreeze does not know."
        )
    words, shape, size = stored.words(), stored.shape, ITEM_SIZES[noted.dtype]
    if stored.dtype != noted.dtype:
        if noted.dtype in _CODES or stored.dtype != "uint8" or words.nbytes % size:
            raise _corrupt(path, f"{name} is noted as {noted.dtype} and stored as {stored.dtype}")
        words = words.view(np.dtype(f"<u{min(size, 8)}"))
        shape = (len(words) * words.itemsize // size,)
        if not noted.placement and shape == (prod(noted.shape),):
            shape = noted.shape
    # A shard has a shape of its own; the noted one is that of the whole tensor.
    if not noted.placement and shape != noted.shape:
        raise _corrupt(path, f"{name} is noted with the shape {noted.shape} and stored as {shape}")
    return KeptTensor(noted.dtype, shape, words)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def _corrupt(path: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{path} is damaged: {what}. Take the snapshot again.")
