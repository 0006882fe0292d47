"""The state_dicts of a file, a mapping or a model, and where they were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bnfreeze.checkpoints import Checkpoint, StateDict, StateDicts, Uninterpreted
from bnfreeze.findings import Finding, Level, finding
from bnfreeze.text import listed

RUNS_CODE: Final = "runs-code"
_RUNS: Final[dict[Level, str]] = {
    "error": "loading the file with torch.load(weights_only=False) or pickle calls {}.",
    "warning": "cannot be judged: loading the file with torch.load(weights_only=False) runs "
    "the code of {}.",
    "note": "it holds modules that were saved whole: loading it runs the code of {}.",
}


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
            what += f" · {len(keys)} models: {listed(keys, 4)}"
        elif self.key:
            what += f" · under the key {self.key!r}"
        stripped = dict.fromkeys(part for model in self.models for part in model.stripped)
        if stripped:
            what += f" · without {' and '.join(map(repr, stripped))}"
        lines = [what]
        names = [
            f"`{one.name}`" + (f" under {one.where!r}" if one.where else "")
            for one in self.uninterpreted
        ]
        if names:
            were = "was" if len(names) == 1 else "were"
            lines.append(f"{listed(names, 4)} {were} left uninterpreted.")
        return (*lines, *self.remarks)


@dataclass(frozen=True)
class Found:
    """The state_dicts of a file, a mapping or a model.

    Attributes:
        parts: the state_dicts.
        checkpoint: what they were found in; of what is in memory one without a path.
    """

    parts: StateDicts
    checkpoint: Checkpoint

    def origin(self, parts: Sequence[StateDict]) -> Origin:
        """Where these parts of it were found."""
        storages = dict(tensor.storage() for part in parts for tensor in part.tensors.values())
        return Origin(
            str(self.checkpoint.path),
            self.checkpoint.kind,
            tuple(ModelOrigin(part.key, part.stripped, len(part.tensors)) for part in parts),
            sum(len(part.tensors) for part in parts),
            sum(storages.values()),
            self.checkpoint.uninterpreted,
            self.checkpoint.remarks,
        )

    def code_findings(self) -> tuple[Finding, ...]:
        """A finding for each level of what loading the file would call, the worst first.

        bnfreeze itself calls nothing of it.
        """
        names: dict[Level, list[str]] = {level: [] for level in _RUNS}
        for call in self.checkpoint.calls:
            where = f" (under {call.where!r})" if call.where else ""
            names[call.level].append(f"`{call.name}`{where}")
        return tuple(
            finding("runs-code", "", _RUNS[level].format(listed(found, 5)), level=level)
            for level, found in names.items()
            if found
        )


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
