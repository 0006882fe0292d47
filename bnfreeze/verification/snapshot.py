"""A snapshot: what tensors were at one moment, in memory and as a file. Needs no torch.

A file is safetensors with the values, and its metadata has the facts and the digests.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from bnfreeze.checkpoints import StoredTensor, open_checkpoint
from bnfreeze.checkpoints.limits import MAX_HEADER_BYTES, check_limit
from bnfreeze.checkpoints.safetensors_file import DTYPES
from bnfreeze.checkpoints.stored_tensor import ITEM_SIZES
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError
from bnfreeze.files import replacement
from bnfreeze.verification.compare import compare
from bnfreeze.verification.drift import DriftReport
from bnfreeze.verification.state import OwnerFacts, State, TensorFacts
from bnfreeze.verification.values import KeptTensor

_FORMAT = "bnfreeze-snapshot"
_SCHEMA = 1
_KEY = "bnfreeze"
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_TYPES: dict[type, Any] = {kind: get_type_hints(kind) for kind in (TensorFacts, OwnerFacts)}


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

        It is a safetensors file: with the values, or with no tensors if there are digests. Its
        metadata has the facts. Not written are which objects the tensors were, where their memory
        was, and what optimizers had.

        Raises:
            UnsupportedFormatError: a tensor has a dtype that cannot be written.
            OSError: the file cannot be written; what was there before is still there.
        """
        facts = {
            "selection": self.state.selection,
            "tensors": {name: facts._asdict() for name, facts in self.state.tensors.items()},
            "owners": {name: facts._asdict() for name, facts in self.state.owners.items()},
            "groups": self.state.groups,
        }
        noted: dict[str, Any] = {"format": _FORMAT, "schema": _SCHEMA, "facts": facts}
        if self.state.digests:
            noted["sha256"] = dict(self.state.digests)
        header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(noted)}}
        end = 0
        for name, value in self.state.values.items():
            if value.dtype not in _CODES:
                raise UnsupportedFormatError(
                    f"{name} has the dtype {value.dtype}, which cannot be written. Take the "
                    f"snapshot with digest=True, or leave it out with tensors=…"
                )
            start, end = end, end + value.numel * ITEM_SIZES[value.dtype]
            header[name] = {
                "dtype": _CODES[value.dtype],
                "shape": value.shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        check_limit(len(text), MAX_HEADER_BYTES, "bytes of a snapshot's facts")
        with replacement(path) as fresh, fresh.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for value in self.state.values.values():
                for piece in value.pieces():
                    file.write(piece.data)

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read what `save` wrote, on any machine, device and version of torch; values on the CPU.

        Raises:
            UnsupportedFormatError: the file is not a snapshot, or a later version of bnfreeze
                wrote it.
            CorruptCheckpointError: its parts contradict each other, or some are missing.
            OSError: the file cannot be read.
        """
        path = Path(path)
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnsupportedFormatError(f"{path} is not a snapshot: it is not a regular file.")
        with path.open("rb") as stream:
            start = stream.read(9)
        if start[8:] != b"{":
            raise UnsupportedFormatError(
                f"{path} is not a snapshot: it is no safetensors file. Snapshot.save writes one "
                f"of a model, and `bnfreeze snapshot` one of a checkpoint."
            )
        with open_checkpoint(path) as opened:
            noted = _noted(path) if opened.kind == "safetensors" else {}
            if not noted:
                raise UnsupportedFormatError(
                    f"{path} is a safetensors file, but not a snapshot: it lacks the facts that "
                    f"Snapshot.save writes. `bnfreeze snapshot` makes a snapshot of a checkpoint."
                )
            return cls(_state(path, noted, opened.root))

    def __eq__(self, other: object) -> bool:
        return self.compared_to(other).ok if isinstance(other, Snapshot) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # equality is of what tensors hold

    def __len__(self) -> int:
        return len(self.state.tensors)

    def __repr__(self) -> str:
        kept = "digests" if self.digest else "a copy"
        return f"<Snapshot of {len(self)} tensors ({self.tensors}), {kept}>"


def _noted(path: Path) -> dict[str, Any]:
    """What `save` wrote into the metadata; empty if there is none. The header has been checked."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    try:
        noted = json.loads(header["__metadata__"][_KEY])
    except (KeyError, TypeError):
        return {}
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its facts are not valid JSON ({error})") from error
    return noted if isinstance(noted, dict) and noted.get("format") == _FORMAT else {}


def _state(path: Path, noted: dict[str, Any], stored: dict[str, StoredTensor]) -> State:
    """The facts with what is stored: every readable tensor has its values or its digest."""
    if noted.get("schema") != _SCHEMA:
        raise UnsupportedFormatError(
            f"{path} is a snapshot of schema {noted.get('schema')!r:.20}, and this version of "
            f"bnfreeze reads schema {_SCHEMA}: use the version that wrote it, or a later one."
        )
    try:
        facts = noted["facts"]
        tensors = {
            name: TensorFacts(**{**fields, "shape": tuple(map(int, fields["shape"]))})
            for name, fields in facts["tensors"].items()
        }
        owners = {name: OwnerFacts(**fields) for name, fields in facts["owners"].items()}
        groups = tuple(tuple(map(str, group)) for group in facts["groups"])
        selection = str(facts["selection"])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise _corrupt(path, f"its facts are incomplete ({error!r:.200})") from error
    for noted_facts in (*tensors.values(), *owners.values()):
        for fact, kind in _TYPES[type(noted_facts)].items():
            if fact != "shape" and not isinstance(known := getattr(noted_facts, fact), kind):
                raise _corrupt(path, f"{known!r:.40} in its facts is no {fact}")
    fit = all(one.first in tensors and one.owner in owners for one in tensors.values())
    if not (tensors and fit and tensors.keys() >= {name for group in groups for name in group}):
        raise _corrupt(path, "the names in its facts do not fit together")
    digests = noted.get("sha256", {})
    if not isinstance(digests, dict) or not all(
        isinstance(value, str) and len(value) == 64 for value in digests.values()
    ):
        raise _corrupt(path, "it has no list of SHA-256 digests")
    wanted = tensors if digests else {one.first for one in tensors.values()}
    readable = {name for name in wanted if not tensors[name].unreadable}
    for name in sorted(readable ^ (digests | stored).keys()):
        what = "is noted, but its values are missing" if name in readable else "is not noted"
        raise _corrupt(path, f"{name} {what}")
    values = {}
    for name, value in stored.items():
        one = tensors[name]
        fits = one.shape == value.shape or one.placement  # a shard has a shape of its own
        if one.dtype != value.dtype or not fits:
            what = f"{name} is noted as {one.dtype} of shape {one.shape}, but is not"
            raise _corrupt(path, what)
        values[name] = KeptTensor(value.dtype, value.shape, value.words())
    return State(selection, tensors, owners, groups, values, digests)


def _corrupt(path: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{path} is damaged: {what}. Take the snapshot again.")
