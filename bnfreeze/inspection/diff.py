"""What moved between two checkpoints, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from bnfreeze.checkpoints.stored_tensor import StoredTensor, Words, check_claims, decoded
from bnfreeze.errors import CheckpointError
from bnfreeze.findings import Finding, finding
from bnfreeze.inspection.origin import Origin
from bnfreeze.inspection.tree import grouped
from bnfreeze.tables import Printable, Sheet

__all__ = ["Difference", "TensorChange", "compare"]

Status = Literal["identical", "moved", "dtype", "shape", "added", "removed", "unread"]
Role = Literal["statistics", "weight", "bias", "other"]

_COUNT = "num_batches_tracked"
_STATISTICS = frozenset({"running_mean", "running_var", _COUNT})


@dataclass(frozen=True)
class TensorChange:
    """One tensor, in both checkpoints.

    Attributes:
        name: its dotted name.
        role: ``"statistics"``, ``"weight"``, ``"bias"`` or ``"other"``, by its name.
        status: ``"identical"`` (every bit), ``"moved"``, another ``"dtype"`` or ``"shape"``,
            ``"added"`` (in the second alone), ``"removed"`` (in the first alone), ``"unread"``
            (no values that can be compared: sparse, quantised, saved without any).
        total: how many elements.
        changed: how many of them differ in any bit.
        max_abs: the largest difference; None where nothing finite can be said.
    """

    name: str
    role: Role
    status: Status
    total: int
    changed: int = 0
    max_abs: float | None = None


@dataclass(frozen=True)
class Difference(Printable):
    """Two checkpoints compared, tensor by tensor.

    Attributes:
        first: where the first was found.
        second: where the second was found.
        tensors: one entry for each name, in the first's order; added ones last.
        findings: what the differences together tell.
    """

    first: Origin
    second: Origin
    tensors: tuple[TensorChange, ...]
    findings: tuple[Finding, ...]

    @property
    def identical(self) -> bool:
        """Whether both have the same names and every bit is the same."""
        return all(change.status == "identical" for change in self.tensors)

    def modules(self) -> dict[str, list[TensorChange]]:
        """The tensors by the part of the model that they belong to."""
        groups = grouped([change.name for change in self.tensors])
        return {name: [self.tensors[i] for i in members] for name, members in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        return {
            "schema": 2,
            "identical": self.identical,
            "first": asdict(self.first),
            "second": asdict(self.second),
            "modules": {
                name: all(change.status == "identical" for change in changes)
                for name, changes in self.modules().items()
            },
            "tensors": [asdict(change) for change in self.tensors],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        rows = []
        for name, changes in self.modules().items():
            # That a batch more was counted is no size.
            sizes = [c for c in changes if c.max_abs and not c.name.endswith(_COUNT)]
            most = max(sizes, key=lambda c: c.max_abs or 0.0, default=None)
            rows.append(
                (
                    name,
                    *(
                        _told([c for c in changes if c.role == role])
                        for role in ("statistics", "weight", "bias", "other")
                    ),
                    f"{most.max_abs:.3g}" if most else "",
                    most.name if most else "",
                )
            )
        return Sheet(
            title=f"{self.first.path} → {self.second.path}",
            columns=(
                "module",
                "statistics",
                "weights",
                "biases",
                "other",
                "largest",
                "largest, in",
            ),
            rows=rows,
            findings=self.findings,
            verdict=self._verdict(),
            further=frozenset({"largest, in"}),
            notes=tuple(
                f"{'from' if number == 0 else 'to  '} {line}"
                for number, origin in enumerate((self.first, self.second))
                for line in origin.summary()[:1]
            ),
            findings_first=True,
        )

    def lines(self) -> list[tuple[str, ...]]:
        """One line a tensor, for grep: a cell for each fact."""
        return [
            (
                change.status,
                change.name,
                f"{change.changed}/{change.total}",
                "-" if change.max_abs is None else f"{change.max_abs:.6g}",
            )
            for change in self.tensors
        ]

    def _verdict(self) -> str:
        if self.identical:
            return f"Bit-identical: all {len(self.tensors)} tensors."
        kept: list[str] = []
        changed: list[str] = []
        for name, changes in self.modules().items():
            same = all(change.status == "identical" for change in changes)
            (kept if same else changed).append(name)
        if {change.status for change in self.tensors} <= {"added", "removed"}:
            parts = ["No name is in both: these are different models, or their names differ."]
        elif not kept:
            parts = ["Changed in every part."]
        elif len(changed) < len(kept):
            parts = [f"Bit-identical but for {_listed(changed)}."]
        else:
            parts = [f"Bit-identical: {_listed(kept)}. Changed: {_listed(changed)}."]
        statistics = [change for change in self.tensors if change.role == "statistics"]
        if statistics and all(change.status == "identical" for change in statistics):
            parts.append(f"All {len(statistics)} running statistics are bit-identical.")
        return " ".join(parts)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _told(changes: list[TensorChange]) -> str:
    if not changes:
        return ""
    for statuses, word in (
        ({"dtype", "shape"}, "differ"),
        ({"added", "removed"}, "missing"),
        ({"moved"}, "moved"),
        ({"unread"}, "unread"),
    ):
        count = sum(change.status in statuses for change in changes)
        if count:
            return f"{count} of {len(changes)} {word}"
    return "identical"


def compare(
    first: Mapping[str, StoredTensor],
    second: Mapping[str, StoredTensor],
    origins: tuple[Origin, Origin],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Difference:
    """Compare two state_dicts by the bits of their tensors.

    Args:
        first: the earlier one, by name.
        second: the later one.
        origins: where they were found.
        progress: is told how many tensors are done, and of how many.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    for state, origin in zip((first, second), origins, strict=True):
        try:
            check_claims(state.values())
        except CheckpointError as error:
            raise type(error)(f"{origin.path}: {error}") from None
    names = [*first, *(name for name in second if name not in first)]
    changes = []
    for done, name in enumerate(names):
        progress(done, len(names))
        try:
            changes.append(_change(name, first.get(name), second.get(name)))
        except CheckpointError as error:
            raise type(error)(f"{name}: {error}") from None
    progress(len(names), len(names))
    return Difference(*origins, tuple(changes), tuple(_leaks(changes)))


def _change(name: str, a: StoredTensor | None, b: StoredTensor | None) -> TensorChange:
    last = name.rpartition(".")[2]
    role: Role = "statistics" if last in _STATISTICS else "other"
    if last == "weight" or last == "bias":
        role = last  # type: ignore[assignment]
    present = a if a is not None else b
    assert present is not None
    total = present.numel
    if a is None or b is None:
        return TensorChange(name, role, "removed" if b is None else "added", total)
    if a.shape != b.shape:
        return TensorChange(name, role, "shape", total)
    if a.dtype != b.dtype:
        return TensorChange(name, role, "dtype", total)
    if not (a.has_values and b.has_values):
        return TensorChange(name, role, "unread", total)
    changed, most = 0, None
    for one, other in zip(a.pieces(), b.pieces(), strict=True):
        count, size = _piece_change(one, other, a.dtype)
        changed += count
        most = size if most is None else max(most, size if size is not None else most)
    return TensorChange(name, role, "moved" if changed else "identical", total, changed, most)


def _piece_change(one: Words, other: Words, dtype: str) -> tuple[int, float | None]:
    """How many elements differ in their bits, and by how much at most, as far as finite."""
    differs = one != other
    if not differs.any():
        return 0, None
    pairs = differs.reshape(-1, 2).any(axis=1) if dtype == "complex128" else differs
    if dtype.startswith("complex"):
        return int(pairs.sum()), None
    x, y = decoded(one[differs], dtype), decoded(other[differs], dtype)
    if x is None or y is None:
        return int(pairs.sum()), None
    with np.errstate(all="ignore"):
        size = abs(y.astype(np.float64) - x.astype(np.float64))
    size = size[np.isfinite(size)]
    return int(pairs.sum()), float(size.max()) if len(size) else None


def _leaks(changes: list[TensorChange]) -> Iterator[Finding]:
    """Norm layers whose weight and bias stood still, and whose statistics did not."""
    layers: dict[str, dict[str, Status]] = {}
    for change in changes:
        layer, _, part = change.name.rpartition(".")
        layers.setdefault(layer, {})[part] = change.status
    for layer, parts in layers.items():
        affine = [parts[part] for part in ("weight", "bias") if part in parts]
        moved = "moved" in (parts.get("running_mean"), parts.get("running_var"))
        if moved and affine and all(status == "identical" for status in affine):
            yield finding(
                "stats-not-frozen",
                layer,
                "weight and bias are bit-identical, and the running statistics moved.",
            )
