"""The state_dicts of a file, a mapping or a model, and where they were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnfreeze.checkpoints import Checkpoint, CodeCall, StateDict, StateDicts, Uninterpreted

__all__ = ["Found", "ModelOrigin", "Origin"]

# So many are named in a line.
_SHOWN = 4


@dataclass(frozen=True)
class ModelOrigin:
    """Where one model was found.

    Attributes:
        key: under which dotted key; empty for the top.
        stripped: the prefixes that were removed from its names.
        tensors: how many it has.
    """

    key: str
    stripped: tuple[str, ...]
    tensors: int


@dataclass(frozen=True)
class Origin:
    """Where state_dicts were found, and what else is there.

    Attributes:
        path: the file or folder; empty for what is in memory.
        kind: the file's kind, as `bnfreeze.checkpoints.Checkpoint` has it, ``"state_dict"`` or
            ``"model"``.
        models: those that were looked at.
        tensors: how many they have together.
        bytes: the size of their storages, each counted once.
        uninterpreted: the objects in the file that were left as placeholders.
        remarks: sentences about the file.
    """

    path: str
    kind: str
    models: tuple[ModelOrigin, ...]
    tensors: int
    bytes: int
    uninterpreted: tuple[Uninterpreted, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The key of the model, if there is only one; else empty."""
        return self.models[0].key if len(self.models) == 1 else ""

    def summary(self) -> tuple[str, ...]:
        """The same as lines to print."""
        what = f"{self.kind} · {self.tensors} tensors · {_size(self.bytes)}"
        if len(self.models) > 1:
            keys = [repr(model.key) for model in self.models]
            what += f" · {len(keys)} models: {_listed(keys)}"
        elif self.key:
            what += f" · under the key {self.key!r}"
        stripped = dict.fromkeys(part for model in self.models for part in model.stripped)
        if stripped:
            what += f" · without {' and '.join(map(repr, stripped))}"
        return (what, *self._left_out(), *self.remarks)

    def _left_out(self) -> tuple[str, ...]:
        if not self.uninterpreted:
            return ()
        names = [
            f"`{one.name}`" + (f" under {one.where!r}" if one.where else "")
            for one in self.uninterpreted
        ]
        return (f"{_listed(names)} {'was' if len(names) == 1 else 'were'} left uninterpreted.",)


@dataclass(frozen=True)
class Found:
    """The state_dicts of a file, a mapping or a model, and where they were found.

    Attributes:
        parts: the state_dicts.
        path: the file or folder; empty for what is in memory.
        kind: as in `Origin`.
        calls: what loading the file would call.
        uninterpreted: as in `Origin`.
        remarks: as in `Origin`.
    """

    parts: StateDicts
    path: str = ""
    kind: str = "state_dict"
    calls: tuple[CodeCall, ...] = ()
    uninterpreted: tuple[Uninterpreted, ...] = ()
    remarks: tuple[str, ...] = ()

    @classmethod
    def in_checkpoint(cls, checkpoint: Checkpoint, key: str | None = None) -> Found:
        """All that is in a checkpoint, or what is under a key of it.

        Raises:
            UnsupportedFormatError: there is nothing, or nothing under the key.
        """
        return cls(
            checkpoint.chosen(key),
            str(checkpoint.path),
            checkpoint.kind,
            checkpoint.calls,
            checkpoint.uninterpreted,
            checkpoint.remarks,
        )

    def origin(self, parts: Sequence[StateDict]) -> Origin:
        """Where these parts of it were found."""
        storages = dict(tensor.storage() for part in parts for tensor in part.tensors.values())
        return Origin(
            self.path,
            self.kind,
            tuple(ModelOrigin(part.key, part.stripped, len(part.tensors)) for part in parts),
            sum(len(part.tensors) for part in parts),
            sum(storages.values()),
            self.uninterpreted,
            self.remarks,
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
