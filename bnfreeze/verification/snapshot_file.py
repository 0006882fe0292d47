"""A snapshot as a file: a safetensors file with the values, or JSON with the digests."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bnfreeze.errors import CheckpointError, CorruptCheckpointError, UnsupportedFormatError
from bnfreeze.files import replacement
from bnfreeze.verification.facts import Facts
from bnfreeze.verification.state import State

__all__ = ["load", "save"]

_FORMAT = "bnfreeze-snapshot"
_SCHEMA = 1
_KEY = "bnfreeze"
# In bytes; each tensor takes some 600.
_MOST_DIGESTS = 256 << 20

# What every version of safetensors knows; values of another dtype are written as their bytes.
_NATIVE = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}


def save(state: State, path: Path) -> None:
    """Write the state to `path`: to a new file beside it first, which then takes its name."""
    header = {"format": _FORMAT, "schema": _SCHEMA, "facts": state.facts.to_dict()}
    with replacement(path) as fresh:
        if state.digests:
            text = json.dumps({**header, "sha256": dict(state.digests)}, indent=1)
            fresh.write_text(text, encoding="utf-8")
        else:
            values = {name: _writable(value) for name, value in state.values.items()}
            save_file(values, fresh, {_KEY: json.dumps(header)})


def load(path: Path) -> State:
    """Read what `save` wrote; which of the two forms it is, the content says."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UnsupportedFormatError(f"{path} is no snapshot: it is not a regular file.")
    with path.open("rb") as stream:
        start = stream.read(9)
    if start.lstrip().startswith(b"{"):
        return _load_digests(path)
    if len(start) == 9 and start[8:] == b"{":
        return _load_values(path)
    raise UnsupportedFormatError(
        f"{path} is no snapshot: neither safetensors nor JSON. Snapshot.save writes one of a "
        f"model, and `bnfreeze snapshot` one of a checkpoint."
    )


def _load_digests(path: Path) -> State:
    if path.stat().st_size > _MOST_DIGESTS:
        raise _corrupt(path, "it is larger than any list of digests")
    try:
        header = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"it is no valid JSON ({error})") from error
    facts = _facts(path, header)
    digests = header.get("sha256")
    if not isinstance(digests, dict) or not all(_is_digest(value) for value in digests.values()):
        raise _corrupt(path, "it has no list of SHA-256 digests")
    _check_names(path, facts, digests, set(facts.tensors))
    return State(facts, {}, digests)


def _load_values(path: Path) -> State:
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
            values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _corrupt(path, f"it is no valid safetensors file ({error})") from error
    except RuntimeError as error:  # torch's, where the file cannot be mapped
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if text is None:
        raise UnsupportedFormatError(
            f"{path} is a safetensors file, but no snapshot: it lacks the facts that "
            f"Snapshot.save writes. `bnfreeze snapshot` makes one of a checkpoint."
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its facts are no valid JSON ({error})") from error
    facts = _facts(path, header)
    _check_names(path, facts, values, {fact.first for fact in facts.tensors.values()})
    return State(facts, {name: _typed(path, name, values[name], facts) for name in values})


def _facts(path: Path, header: Any) -> Facts:
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise UnsupportedFormatError(f"{path} is no snapshot: Snapshot.save writes one.")
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


def _writable(value: Tensor) -> Tensor:
    value = value.cpu()
    return value if value.dtype in _NATIVE else value.reshape(-1).view(torch.uint8)


def _typed(path: Path, name: str, stored: Tensor, facts: Facts) -> Tensor:
    """The stored values in the dtype and shape that the facts say."""
    noted = facts.tensors[name]
    # Not getattr, with which torch imports more of itself.
    dtype = vars(torch).get(noted.dtype)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedFormatError(
            f"{path}: {name} has the dtype {noted.dtype!r:.40}, which this version of torch lacks."
        )
    if stored.dtype is not dtype:
        if dtype in _NATIVE or stored.dtype is not torch.uint8 or stored.numel() % dtype.itemsize:
            raise _corrupt(path, f"{name} is noted as {noted.dtype} and stored as {stored.dtype}")
        stored = stored.reshape(-1).view(dtype)
        if not noted.placement and stored.numel() == _size(noted.shape):
            stored = stored.reshape(noted.shape)
    # Of a shard the shape is its own, and the noted one that of the whole.
    if not noted.placement and tuple(stored.shape) != noted.shape:
        raise _corrupt(
            path, f"{name} is noted with the shape {noted.shape} and stored as {(*stored.shape,)}"
        )
    return stored


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def _corrupt(path: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{path} is damaged: {what}. Take the snapshot again.")
