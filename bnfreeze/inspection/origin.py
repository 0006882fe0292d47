"""Where a state_dict was found."""

from __future__ import annotations

from dataclasses import dataclass

from bnfreeze.checkpoints import StateDict

__all__ = ["Origin"]


@dataclass(frozen=True)
class Origin:
    """Where a state_dict was found.

    Attributes:
        path: the file or folder; empty for a mapping in memory.
        kind: the file's kind, as `bnfreeze.checkpoints.Checkpoint` has it, or ``"state_dict"``.
        key: under which key it was found; empty for the top.
        stripped: the prefixes that were removed from the names.
        others: the keys of other state_dicts there.
        tensors: how many it has.
        bytes: the size of their storages, each counted once.
    """

    path: str
    kind: str
    key: str
    stripped: tuple[str, ...]
    others: tuple[str, ...]
    tensors: int
    bytes: int

    @classmethod
    def of(cls, found: StateDict, path: str, kind: str) -> Origin:
        """The origin of `found`."""
        return cls(
            path,
            kind,
            found.key,
            found.stripped,
            found.others,
            len(found.tensors),
            found.storage_bytes(),
        )

    def summary(self) -> tuple[str, ...]:
        """The same as lines to print."""
        what = f"{self.kind} · {self.tensors} tensors · {_size(self.bytes)}"
        what += f" · under the key {self.key!r}" if self.key else ""
        if self.stripped:
            what += f" · without {' and '.join(map(repr, self.stripped))}"
        if not self.others:
            return (what,)
        shown = ", ".join(self.others[:4]) + (", …" if len(self.others) > 4 else "")
        return what, f"It has other state_dicts too (--key): {shown}"


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
