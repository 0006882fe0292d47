"""A snapshot: what tensors were at one moment, in memory and as a file. Needs no torch.

A file is safetensors with the values, or JSON with the digests.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bnfreeze.checkpoints import StoredTensor, open_checkpoint
from bnfreeze.checkpoints.stored_tensor import ITEM_SIZES
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError
from bnfreeze.files import replacement
from bnfreeze.verification.compare import compare
from bnfreeze.verification.drift_report import DriftReport
from bnfreeze.verification.state import OwnerFacts, State, TensorFacts
from bnfreeze.verification.values import KeptTensor

__all__ = ["Snapshot"]

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


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a model's tensors were at one moment, made by `snapshot`.

    Two snapshots are equal if nothing has changed from the earlier to the later one, as
    `verify` understands it. In a test: ``assert snapshot(model) == before``.
    """

    state: State = field(repr=False)

    @property
    def tensors(self) -> str:
        """Which tensors were asked for: ``"frozen"``, ``"norm"``, ``"all"`` or a pattern."""
        return self.state.selection

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names of the tensors, aliases included, in the model's order."""
        return tuple(self.state.tensors)

    @property
    def digest(self) -> bool:
        """Whether it has SHA-256 digests instead of a copy."""
        return bool(self.state.digests)

    def compared_to(self, other: Snapshot) -> DriftReport:
        """What changed from the earlier of the two snapshots to the later one."""
        first, second = sorted((self.state, other.state), key=lambda state: state.taken)
        return compare(first, second, gathered=True)

    def save(self, path: str | Path) -> None:
        """Write the snapshot to `path`, whole or not at all.

        With a copy of the values it is a safetensors file, whose metadata has the facts; with
        ``digest=True`` it is JSON. Not written are which objects the tensors were, where their
        memory was, and what optimizers had.

        Raises:
            UnsupportedFormatError: a tensor has a dtype that cannot be written.
            OSError: the file cannot be written; what was there before is still there.
        """
        _save(self.state, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read what `save` wrote, on any machine, device and version of torch; values on the CPU.

        Raises:
            UnsupportedFormatError: the file is not a snapshot, or a later version of bnfreeze
                wrote it.
            CorruptCheckpointError: its parts contradict each other, or some are missing.
            OSError: the file cannot be read.
        """
        return cls(_load(Path(path)))

    def __eq__(self, other: object) -> bool:
        return self.compared_to(other).ok if isinstance(other, Snapshot) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # equality is of what tensors hold

    def __len__(self) -> int:
        return len(self.state.tensors)

    def __repr__(self) -> str:
        kept = "digests" if self.digest else "a copy"
        return f"<Snapshot of {len(self)} tensors ({self.tensors}), {kept}>"


def _save(state: State, path: Path) -> None:
    """Write the state to `path`: to a new file beside it first, which then takes its name."""
    facts = {
        "selection": state.selection,
        "tensors": {name: facts._asdict() for name, facts in state.tensors.items()},
        "owners": {name: facts._asdict() for name, facts in state.owners.items()},
        "groups": state.groups,
    }
    header = {"format": _FORMAT, "schema": _SCHEMA, "facts": facts}
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
            "shape": value.shape if known else [size],
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


def _load(path: Path) -> State:
    """Read what `save` wrote; the content says which of the two forms it is."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UnsupportedFormatError(f"{path} is not a snapshot: it is not a regular file.")
    with path.open("rb") as stream:
        start = stream.read(9)
    if start.startswith(b"{"):
        return _load_digests(path)
    if start[8:] == b"{":
        return _load_values(path)
    raise UnsupportedFormatError(
        f"{path} is not a snapshot: neither safetensors nor JSON. Snapshot.save writes one of "
        f"a model, and `bnfreeze snapshot` one of a checkpoint."
    )


def _load_digests(path: Path) -> State:
    if path.stat().st_size > _MOST_DIGESTS:
        raise _corrupt(path, "it is larger than any list of digests")
    header = _parsed(path, path.read_bytes())
    state = _facts(path, header)
    digests = header.get("sha256")
    if not isinstance(digests, dict) or not all(
        isinstance(value, str) and len(value) == 64 for value in digests.values()
    ):
        raise _corrupt(path, "it has no list of SHA-256 digests")
    _check_names(path, state, digests, set(state.tensors))
    return replace(state, digests=digests)


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
        state = _facts(path, _parsed(path, text))
        _check_names(path, state, stored, {facts.first for facts in state.tensors.values()})
        values = {name: _typed(path, name, stored[name], state.tensors[name]) for name in stored}
        return replace(state, values=values)


def _parsed(path: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its facts are not valid JSON ({error})") from error


def _facts(path: Path, header: Any) -> State:
    """The state without values."""
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise UnsupportedFormatError(f"{path} is not a snapshot: Snapshot.save writes one.")
    if header.get("schema") != _SCHEMA:
        raise UnsupportedFormatError(
            f"{path} is a snapshot of schema {header.get('schema')!r:.20}, and this version of "
            f"bnfreeze reads schema {_SCHEMA}: use the version that wrote it, or a later one."
        )
    try:
        facts = header["facts"]
        tensors = {
            name: TensorFacts(**{**fields, "shape": tuple(map(int, fields["shape"]))})
            for name, fields in facts["tensors"].items()
        }
        owners = {name: OwnerFacts(**fields) for name, fields in facts["owners"].items()}
        groups = tuple(tuple(map(str, group)) for group in facts["groups"])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise _corrupt(path, f"its facts are incomplete ({error!r:.200})") from error
    texts = [text for owner in owners.values() for text in (*owner[:2], owner.remedy)]
    for one in tensors.values():
        texts += [one.kind, one.dtype, one.device, one.owner, one.first]
        texts += [one.placement, one.unreadable]
    if not all(isinstance(text, str) for text in texts):
        raise _corrupt(path, "a name in its facts is not text")
    if not all(isinstance(owner.eps, float | int | None) for owner in owners.values()):
        raise _corrupt(path, "an eps in its facts is not a number")
    known = all(one.first in tensors and one.owner in owners for one in tensors.values())
    if not (tensors and known and tensors.keys() >= {name for group in groups for name in group}):
        raise _corrupt(path, "the names in its facts do not fit together")
    return State(str(facts["selection"]), tensors, owners, groups)


def _check_names(path: Path, state: State, stored: Mapping[str, Any], wanted: set[str]) -> None:
    """Every readable tensor has its values, and nothing else has."""
    wanted = {name for name in wanted if not state.tensors[name].unreadable}
    for name in sorted(wanted ^ stored.keys()):
        what = "is noted, but its values are missing" if name in wanted else "is not noted"
        raise _corrupt(path, f"{name} {what}")


def _typed(path: Path, name: str, stored: StoredTensor, noted: TensorFacts) -> KeptTensor:
    """The stored values in the dtype and shape that the facts say."""
    if noted.dtype not in ITEM_SIZES:
        raise UnsupportedFormatError(
            f"{path}: {name} has the dtype {noted.dtype!r:.40}, which bnfreeze does not know."
        )
    octets, size = stored.words().view(np.uint8), ITEM_SIZES[noted.dtype]
    shape = noted.shape
    if noted.placement:  # a shard has a shape of its own; the noted one is of the whole tensor
        shape = stored.shape if stored.dtype == noted.dtype else (len(octets) // size,)
    if len(octets) != prod(shape) * size:
        wanted = f"{noted.dtype} of shape {shape}"
        raise _corrupt(path, f"{name} is noted as {wanted}, and has {len(octets)} bytes")
    return KeptTensor(noted.dtype, shape, octets.view(f"<u{min(size, 8)}"))


def _corrupt(path: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{path} is damaged: {what}. Take the snapshot again.")
