"""What `diff` found, as data that prints as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bnfreeze.findings import Finding
from bnfreeze.inspection.checkpoint import Unread
from bnfreeze.inspection.origin import RUNS_CODE, Origin
from bnfreeze.sheets import Sheet, grouped
from bnfreeze.tables import Printable
from bnfreeze.text import listed

_COUNT = "num_batches_tracked"
_ROLES = ("statistics", "weight", "bias", "other")
# The order in JSON.
_KEYS = ["schema", "ok", "first", "second", "pairs", "unread", "modules", "tensors", "findings"]


@dataclass(frozen=True)
class TensorChange:
    """One tensor, on both sides.

    Attributes:
        name: its dotted name; the shorter one, if it differs between the two.
        role: ``"statistics"``, ``"weight"``, ``"bias"`` or ``"other"``, by its name.
        kind: ``"identical"`` (every bit), ``"value"``, ``"dtype"``, ``"shape"``, ``"added"`` (only
            in the second), ``"missing"`` (only in the first) or ``"unverified"`` (no values that
            can be compared: sparse, quantised, saved without).
        total: how many elements.
        changed: how many of them differ in any bit.
        max_abs: the largest absolute change; None if no change is a finite number.
        max_ulps: the same in units of the last place, for floating point numbers of one sign.
        cause_code: as in `Drift`; empty if it is identical.
        cause: as in `Drift`.
        key: the dotted key of its model in the first (if it is only in the second, there); empty
            at the top.
    """

    name: str
    role: Literal["statistics", "weight", "bias", "other"]
    kind: Literal["identical", "value", "dtype", "shape", "added", "missing", "unverified"]
    total: int
    changed: int = 0
    max_abs: float | None = None
    max_ulps: int | None = None
    cause_code: str = ""
    cause: str = ""
    key: str = ""


@dataclass(frozen=True)
class ModelPair:
    """Two models that were compared.

    Attributes:
        first: the dotted key of the one in the first; None if the second's has no partner.
        second: the same of the other.
        prefixes: how the names of the first were changed to those of the second: each old prefix
            and its new one.
        in_both: how many tensors have their name in both.
    """

    first: str | None
    second: str | None
    prefixes: tuple[tuple[str, str], ...]
    in_both: int


@dataclass(frozen=True, repr=False)
class Diff(Printable):
    """Two checkpoints, state_dicts or models compared, tensor by tensor.

    Attributes:
        first: where the first was found.
        second: where the second was found.
        pairs: which model was compared with which.
        tensors: one entry for each name, model by model in the first's order; added ones last.
        findings: what the changes together mean, and what loading one of the files would run.
        unread: the models that could not be read, if others could.
    """

    first: Origin
    second: Origin
    pairs: tuple[ModelPair, ...]
    tensors: tuple[TensorChange, ...]
    findings: tuple[Finding, ...]
    unread: tuple[Unread, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether both have the same names and bits, all was read, and no finding is an error."""
        return (
            _same(self.tensors)
            and not self.unread
            and all(one.level != "error" for one in self.findings)
        )

    def modules(self) -> dict[tuple[str, str], list[TensorChange]]:
        """The tensors by the key of their model and the part of it that they belong to."""
        by_key: dict[str, list[TensorChange]] = {}
        for change in self.tensors:
            by_key.setdefault(change.key, []).append(change)
        return {
            (key, name): [changes[index] for index in members]
            for key, changes in by_key.items()
            for name, members in grouped([change.name for change in changes]).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        modules = [
            {"key": key, "name": name, "identical": _same(changes)}
            for (key, name), changes in self.modules().items()
        ]
        facts = {"schema": 2, "ok": self.ok, "modules": modules, **asdict(self)}
        return {key: facts[key] for key in _KEYS}

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        columns = ("module", "statistics", "weights", "biases", "other", "largest", "largest, in")
        rows: list[tuple[str, ...]] = []
        shown = None
        for (key, name), changes in self.modules().items():
            if len(self.pairs) > 1 and key != shown:
                shown = key
                rows.append((f"{key or '(top)'}:",))
            # The count of batches is not a size.
            sizes = [c for c in changes if c.max_abs and not c.name.endswith(_COUNT)]
            most = max(sizes, key=lambda c: c.max_abs or 0.0, default=None)
            cells = (_summary([c for c in changes if c.role == role]) for role in _ROLES)
            largest = (f"{most.max_abs:.3g}", most.name) if most else ("", "")
            rows.append((name, *cells, *largest))
        return Sheet(
            title=" → ".join(one.path or f"a {one.kind}" for one in (self.first, self.second)),
            columns=columns,
            rows=rows,
            findings=self.findings,
            verdict=self._verdict(),
            further=frozenset({"largest, in"}),
            notes=(
                *(f"from {line}" for line in self.first.summary()),
                *(f"to   {line}" for line in self.second.summary()),
                *filter(None, map(_note, self.pairs)),
                *(f"{one.key or '(top)'} was not read: {one.message}" for one in self.unread),
            ),
            findings_first=True,
        )

    def lines(self) -> list[tuple[str, ...]]:
        """One line for each tensor, for grep: a cell for each fact."""
        return [
            (
                *([change.key or "(top)"] if len(self.pairs) > 1 else []),
                change.kind,
                change.name,
                f"{change.changed}/{change.total}",
                "-" if change.max_abs is None else f"{change.max_abs:.6g}",
            )
            for change in self.tensors
        ]

    def _verdict(self) -> str:
        kinds = Counter[str](change.kind for change in self.tensors)
        # Of several models the models, of one its parts.
        same: dict[str, bool] = {}
        for (key, name), changes in self.modules().items():
            part = (key or "(top)") if len(self.pairs) > 1 else name
            same[part] = same.get(part, True) and _same(changes)
        kept = [part for part in same if same[part]]
        changed = [part for part in same if not same[part]]
        if self.unread:
            parts = [f"{len(self.unread)} of {len(self.pairs)} models were not read."]
        elif not changed:
            parts = [f"Bit-identical: all {len(self.tensors)} tensors."]
        elif kinds.keys() <= {"added", "missing"}:
            parts = ["No name is in both: these are different models, or --map OLD=NEW is needed."]
        elif not kept:
            parts = ["Changed in every part."]
        elif len(changed) < len(kept):
            parts = [f"Bit-identical except for {listed(changed, 8)}."]
        else:
            parts = [f"Bit-identical: {listed(kept, 8)}. Changed: {listed(changed, 8)}."]
        for kind in ("missing", "added"):
            if count := kinds[kind]:
                parts.append(f"{count} tensor{'s' if count > 1 else ''} {kind}.")
        statistics = [change for change in self.tensors if change.role == "statistics"]
        if changed and statistics and _same(statistics):
            parts.append(f"All {len(statistics)} running statistics are bit-identical.")
        errors = {one.code for one in self.findings if one.level == "error"}
        if "model-same-memory" in errors:
            parts.append("But both are the same memory: this comparison shows nothing.")
        if "layer-eps-differs" in errors:
            parts.append("But eps differs: the models compute different things.")
        if RUNS_CODE in errors:
            parts.append("Loading one of the files would run code.")
        return " ".join(parts)


def _note(pair: ModelPair) -> str:
    """What a person must know of a pair; empty if there is nothing to say."""
    if pair.first is None or pair.second is None:
        key, side = (pair.first, "first") if pair.second is None else (pair.second, "second")
        return f"Only the {side} has {key or '(top)'}: it was compared with nothing."
    names = ", ".join(f"{old!r} → {new!r}" for old, new in pair.prefixes)
    return f"Names matched: {names}; {pair.in_both} tensors are in both." if names else ""


def _same(changes: Iterable[TensorChange]) -> bool:
    return all(change.kind == "identical" for change in changes)


def _summary(changes: list[TensorChange]) -> str:
    """A cell: how many tensors are missing and added, and how many of the others changed."""
    kinds = Counter[str](change.kind for change in changes)
    both = len(changes) - kinds["missing"] - kinds["added"]
    counts = {
        "missing": kinds["missing"],
        "added": kinds["added"],
        f"of {both} differ": kinds["dtype"] + kinds["shape"],
        f"of {both} moved": kinds["value"],
        f"of {both} unread": kinds["unverified"],
    }
    words = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return words or ("identical" if changes else "")
