"""A snapshot: what tensors were at one moment. Needs no torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from bnfreeze.verification import snapshot_file
from bnfreeze.verification.compare import compare
from bnfreeze.verification.drift_report import DriftReport
from bnfreeze.verification.state import State

__all__ = ["Snapshot", "next_moment"]

_clock = itertools.count(1)


def next_moment() -> int:
    """A number that is larger for each later snapshot."""
    return next(_clock)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a model's tensors were at one moment, made by `snapshot`.

    Two snapshots are equal if nothing has changed from the earlier to the later one, as
    `verify` understands it. In a test: ``assert snapshot(model) == before``.
    """

    state: State = field(repr=False)
    # Which of two was taken first; 0 for one from a file.
    taken: int = 0

    @property
    def tensors(self) -> str:
        """Which tensors were asked for: ``"frozen"``, ``"norm"``, ``"all"`` or a pattern."""
        return self.state.facts.selection

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names of the tensors, aliases included, in the model's order."""
        return tuple(self.state.facts.tensors)

    @property
    def digest(self) -> bool:
        """Whether it has SHA-256 digests instead of a copy."""
        return bool(self.state.digests)

    def compared_to(self, other: Snapshot) -> DriftReport:
        """What changed from the earlier of the two snapshots to the later one."""
        first, second = sorted((self, other), key=lambda one: one.taken)
        return compare(first.state, second.state, gathered=True)

    def save(self, path: str | Path) -> None:
        """Write the snapshot to `path`, whole or not at all.

        With a copy of the values it is a safetensors file, whose metadata has the facts; with
        ``digest=True`` it is JSON. Not written are which objects the tensors were, where their
        memory was, and what optimizers had.

        Raises:
            UnsupportedFormatError: a tensor has a dtype that cannot be written.
            OSError: the file cannot be written; what was there before is still there.
        """
        snapshot_file.save(self.state, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read what `save` wrote, on any machine, device and version of torch; values on the CPU.

        Raises:
            UnsupportedFormatError: the file is not a snapshot, or a later version of bnfreeze
                wrote it.
            CorruptCheckpointError: its parts contradict each other, or some are missing.
            OSError: the file cannot be read.
        """
        return cls(snapshot_file.load(Path(path)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return self.compared_to(other).ok

    __hash__ = None  # type: ignore[assignment]  # equality is of what tensors hold

    def __len__(self) -> int:
        return len(self.state.facts.tensors)

    def __repr__(self) -> str:
        kept = "digests" if self.digest else "a copy"
        return f"<Snapshot of {len(self)} tensors ({self.tensors}), {kept}>"
