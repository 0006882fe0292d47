"""diff: what changed between two checkpoints, state_dicts or models, bit by bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bnfreeze.checkpoints import StoredTensor, open_checkpoint, tensors_by_name
from bnfreeze.errors import CheckpointError
from bnfreeze.findings import Finding, finding
from bnfreeze.inspection.code_calls import code_findings
from bnfreeze.inspection.inspect import selected
from bnfreeze.inspection.origin import Found, Origin
from bnfreeze.inspection.tree import grouped
from bnfreeze.tables import Printable, Sheet
from bnfreeze.verification.compare import compare
from bnfreeze.verification.drift import Drift, Kind
from bnfreeze.verification.stored import state_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Diff", "TensorChange", "diff", "diff_found", "diff_stored"]

Role = Literal["statistics", "weight", "bias", "other"]

_COUNT = "num_batches_tracked"
_STATISTICS = frozenset({"running_mean", "running_var", _COUNT})
# If a tensor changed in several ways, the first of these is shown.
_ORDER = ("removed", "added", "shape", "dtype", "unverified", "value")


@dataclass(frozen=True)
class TensorChange:
    """One tensor, on both sides.

    Attributes:
        name: its dotted name.
        role: ``"statistics"``, ``"weight"``, ``"bias"`` or ``"other"``, by its name.
        kind: ``"identical"`` (every bit), or the kind of its `Drift`: ``"value"``, ``"dtype"``,
            ``"shape"``, ``"added"`` (only in the second), ``"removed"`` (only in the first),
            ``"unverified"`` (no values that can be compared: sparse, quantised, saved without).
        total: how many elements.
        changed: how many of them differ in any bit.
        max_abs: the largest absolute change; None if no change is a finite number.
        cause_code: as in `Drift`; empty if it is identical.
        cause: as in `Drift`.
    """

    name: str
    role: Role
    kind: Kind | Literal["identical"]
    total: int
    changed: int = 0
    max_abs: float | None = None
    cause_code: str = ""
    cause: str = ""


@dataclass(frozen=True)
class Diff(Printable):
    """Two checkpoints, state_dicts or models compared, tensor by tensor.

    Attributes:
        first: where the first was found.
        second: where the second was found.
        tensors: one entry for each name, in the first's order; added ones last.
        findings: what the changes together mean.
    """

    first: Origin
    second: Origin
    tensors: tuple[TensorChange, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether both have the same names and every bit is the same, and none would run code."""
        return _same(self.tensors) and all(one.level != "error" for one in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        changed = sum(change.kind != "identical" for change in self.tensors)
        return f"<Diff: {changed} of {len(self.tensors)} tensors changed>"

    def modules(self) -> dict[str, list[TensorChange]]:
        """The tensors by the part of the model that they belong to."""
        groups = grouped([change.name for change in self.tensors])
        return {name: [self.tensors[i] for i in members] for name, members in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        return {
            "schema": 2,
            "ok": self.ok,
            "first": asdict(self.first),
            "second": asdict(self.second),
            "modules": {name: _same(changes) for name, changes in self.modules().items()},
            "tensors": [asdict(change) for change in self.tensors],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        rows = []
        for name, changes in self.modules().items():
            # The count of batches is not a size.
            sizes = [c for c in changes if c.max_abs and not c.name.endswith(_COUNT)]
            most = max(sizes, key=lambda c: c.max_abs or 0.0, default=None)
            roles = ("statistics", "weight", "bias", "other")
            cells = (_summary([c for c in changes if c.role == role]) for role in roles)
            largest = (f"{most.max_abs:.3g}", most.name) if most else ("", "")
            rows.append((name, *cells, *largest))
        columns = ("module", "statistics", "weights", "biases", "other", "largest", "largest, in")
        return Sheet(
            title=f"{_shown(self.first)} → {_shown(self.second)}",
            columns=columns,
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
        """One line for each tensor, for grep: a cell for each fact."""
        return [
            (
                change.kind,
                change.name,
                f"{change.changed}/{change.total}",
                "-" if change.max_abs is None else f"{change.max_abs:.6g}",
            )
            for change in self.tensors
        ]

    def _verdict(self) -> str:
        if _same(self.tensors):
            end = "." if self.ok else "; loading one of them would run code."
            return f"Bit-identical: all {len(self.tensors)} tensors{end}"
        parts_of = self.modules()
        kept = [name for name, changes in parts_of.items() if _same(changes)]
        changed = [name for name in parts_of if name not in kept]
        if {change.kind for change in self.tensors} <= {"added", "removed"}:
            parts = ["No name is in both: these are different models, or their names differ."]
        elif not kept:
            parts = ["Changed in every part."]
        elif len(changed) < len(kept):
            parts = [f"Bit-identical except for {_listed(changed)}."]
        else:
            parts = [f"Bit-identical: {_listed(kept)}. Changed: {_listed(changed)}."]
        statistics = [change for change in self.tensors if change.role == "statistics"]
        if statistics and _same(statistics):
            parts.append(f"All {len(statistics)} running statistics are bit-identical.")
        return " ".join(parts)


def _same(changes: Iterable[TensorChange]) -> bool:
    return all(change.kind == "identical" for change in changes)


def _shown(origin: Origin) -> str:
    return origin.path or f"a {origin.kind}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _summary(changes: list[TensorChange]) -> str:
    if not changes:
        return ""
    for kinds, word in (
        ({"dtype", "shape"}, "differ"),
        ({"added", "removed"}, "missing"),
        ({"value"}, "moved"),
        ({"unverified"}, "unread"),
    ):
        count = sum(change.kind in kinds for change in changes)
        if count:
            return f"{count} of {len(changes)} {word}"
    return "identical"


def diff(
    a: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    b: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    *,
    select: str | Iterable[str] | None = None,
    key: str | None = None,
) -> Diff:
    """Compare two checkpoints, state_dicts or models, bit by bit.

    A model stands for its state_dict. Nothing in a file is run or imported.

    Args:
        a: the earlier one: the path of a checkpoint, a state_dict or a mapping that has one, or a
            model.
        b: the later one.
        select: a pattern of dotted module names, or several: only these are compared. None means
            all.
        key: if a checkpoint has several state_dicts, the one to take, such as ``"model_ema"``; None
            for all of them.

    Returns:
        A `Diff`; it is true if both have the same names and every bit is the same.

    Raises:
        TypeError: one is none of these.
        PolicyError: a pattern is malformed or matches nothing.
        CheckpointError: a checkpoint cannot be read.
    """
    patterns = [select] if isinstance(select, str) else list(select or ())
    with ExitStack() as stack:
        first, second = (_found(one, key, stack) for one in (a, b))
        return diff_found(first, second, select=patterns)


def _found(what: object, key: str | None, stack: ExitStack) -> Found:
    if isinstance(what, str | os.PathLike):
        return Found.in_checkpoint(stack.enter_context(open_checkpoint(what)), key)
    kind = "state_dict"
    if not isinstance(what, Mapping):
        from bnfreeze.norm_layers import check_model

        what, kind, key = check_model(what).state_dict(), "model", None
    from bnfreeze.inspection.in_memory import found_in

    return found_in(what, kind, key)


def diff_found(
    first: Found,
    second: Found,
    *,
    select: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diff:
    """Compare all that was found on two sides.

    If each side has one model, these two are compared, whatever their keys. Other state_dicts, and
    several models, are compared with those of the same key: their names begin with it.

    Args:
        first: the earlier one.
        second: the later one.
        select: patterns of dotted module names, within each state_dict; none means all.
        progress: is called with how many tensors are done, and of how many.

    Raises:
        PolicyError: a pattern is malformed or matches nothing.
        CheckpointError: a tensor cannot be read, or it is not clear which models to compare.
    """
    sides = (first, second)
    several = any(len(side.parts.models) > 1 for side in sides)
    keys = [{model.key for model in side.parts.models} for side in sides]
    if several and keys[0].isdisjoint(keys[1]):
        shown = (", ".join(map(repr, sorted(found))) for found in keys)
        raise CheckpointError(
            f"Which models to compare is not clear: there are {' and '.join(shown)}. "
            f"Choose with the key."
        )
    parts = [selected(side.parts.all, select) for side in sides]
    tensors = [
        tensors_by_name(own, plain=None if several else side.parts.models[0].key)
        for own, side in zip(parts, sides, strict=True)
    ]
    origins = (first.origin(parts[0]), second.origin(parts[1]))
    found = diff_stored(tensors[0], tensors[1], origins, progress=progress)
    further = code_findings(tuple(dict.fromkeys((*first.calls, *second.calls))))
    return replace(found, findings=(*further, *found.findings))


def diff_stored(
    first: Mapping[str, StoredTensor],
    second: Mapping[str, StoredTensor],
    origins: tuple[Origin, Origin],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diff:
    """Compare two state_dicts.

    Args:
        first: the tensors of the earlier one, by name.
        second: those of the later one.
        origins: where they were found.
        progress: is called with how many tensors are done, and of how many.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    states = []
    for tensors, origin in zip((first, second), origins, strict=True):
        try:
            states.append(state_of(tensors))
        except CheckpointError as error:
            raise type(error)(f"{_shown(origin)}: {error}") from None
    drifts: dict[str, Drift] = {}
    for drift in compare(*states, progress=progress).drifts:
        known = drifts.setdefault(drift.name, drift)
        if _ORDER.index(drift.kind) < _ORDER.index(known.kind):
            drifts[drift.name] = drift
    names = [*first, *(name for name in second if name not in first)]
    changes = tuple(
        _change(name, (first.get(name) or second[name]).numel, drifts.get(name)) for name in names
    )
    return Diff(*origins, changes, tuple(_leaks(changes)))


def _change(name: str, total: int, drift: Drift | None) -> TensorChange:
    last = name.rpartition(".")[2]
    role: Role = "statistics" if last in _STATISTICS else "other"
    if last == "weight" or last == "bias":
        role = last  # type: ignore[assignment]
    if drift is None:
        return TensorChange(name, role, "identical", total)
    return TensorChange(
        name,
        role,
        drift.kind,
        total,
        drift.changed or 0,
        drift.max_abs,
        drift.cause_code,
        drift.cause,
    )


def _leaks(changes: Iterable[TensorChange]) -> Iterator[Finding]:
    """Norm layers whose weight and bias did not change, and whose statistics did."""
    layers: dict[str, dict[str, str]] = {}
    for change in changes:
        layer, _, part = change.name.rpartition(".")
        layers.setdefault(layer, {})[part] = change.kind
    for layer, parts in layers.items():
        affine = [parts[part] for part in ("weight", "bias") if part in parts]
        moved = "value" in (parts.get("running_mean"), parts.get("running_var"))
        if moved and affine and all(kind == "identical" for kind in affine):
            yield finding(
                "stats-not-frozen",
                layer,
                "weight and bias are bit-identical, and the running statistics moved.",
            )
