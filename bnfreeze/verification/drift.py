"""What changed between two states: as data, as a sentence, and as a table. Needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import Any, Literal

from bnfreeze.errors import BnfreezeError
from bnfreeze.findings import Finding
from bnfreeze.sheets import Sheet
from bnfreeze.tables import Printable
from bnfreeze.text import counted, encodable, escaped

Kind = Literal[
    "value",
    "dtype",
    "shape",
    "device",
    "added",
    "removed",
    "aliasing",
    "replaced",
    "thawed",
    "mode",
    "requires-grad",
    "optimizer",
    "grad",
    "unverified",
]
Scalar = bool | int | float | complex | str

_VERBS = {
    "value": "drifted",
    "added": "was added",
    "removed": "was removed",
    "aliasing": "shares its memory differently",
    "replaced": "was replaced",
    "thawed": "was thawed",
    "mode": "went into train mode",
    "requires-grad": "has a different requires_grad",
    "grad": "has a .grad",
    "unverified": "could not be verified",
}


@dataclass(frozen=True)
class Drift:
    """Something that is not as it was.

    Attributes:
        name: the tensor's dotted name, its first one if it has several; for ``thawed`` and
            ``mode`` the layer's.
        kind: what changed:

            * ``value``: bits of the elements; or the eps of a norm layer, as ``bn1.eps``.
            * ``dtype``, ``shape``, ``device``.
            * ``added``, ``removed``: the name itself.
            * ``aliasing``: which names share memory.
            * ``replaced``: another parameter is registered under the name, so optimizers and
              other references still have the old one; or a parameter became a buffer, a buffer
              became non-persistent, a layer that was not frozen got another class.
            * ``thawed``: the class or the policy of a frozen layer, or its mode from eval to train.
            * ``mode``: a layer that was not frozen went from eval to train mode.
            * ``requires-grad``: the flag.
            * ``optimizer``: whether it is in the optimizer.
            * ``grad``: it has a ``.grad`` although it requires none.
            * ``unverified``: it cannot be compared, and so does not count as unchanged.
        changed: how many elements differ in any bit; None if they were not counted.
        total: how many elements there are.
        first_index: the index of the first of them, in row-major order; ``()`` for a
            0-dimensional tensor.
        before: its value before; for the other kinds, what was. If both values look alike (two
            NaN), they come with their bits.
        after: its value after; for the other kinds, what is.
        max_abs: the largest absolute change; None if no change is a finite number.
        max_ulps: the largest change of a floating point number, in units of its last place; None
            for other dtypes, and if a sign or an infinity changed.
        step: the optimizer steps completed when it was seen; None outside of `guard`.
        since: the optimizer steps completed at the last check that found no drift.
        rank: the rank on which it was seen; None without a process group.
        operation: the operation that wrote, under ``guard(trace=True)``.
        where: file and line of the user's code that called it.
        cause_code: a stable name of the cause, such as ``"forward-in-training"``; ``"unknown"``
            if nothing shows it.
        cause: the likeliest cause, from what can be seen, as a sentence.
        remedy: what to do about it.
    """

    name: str
    kind: Kind
    changed: int | None = None
    total: int | None = None
    first_index: tuple[int, ...] | None = None
    before: Scalar | None = None
    after: Scalar | None = None
    max_abs: float | None = None
    max_ulps: int | None = None
    step: int | None = None
    since: int | None = None
    rank: int | None = None
    operation: str | None = None
    where: str | None = None
    cause_code: str = ""
    cause: str = ""
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; numbers that JSON lacks are strings."""
        text = json.dumps(asdict(self), default=str)
        facts: dict[str, Any] = json.loads(text, parse_constant=lambda word: str(float(word)))
        return facts


def sentence(drift: Drift) -> str:
    """Where and what, in one sentence."""
    verb = _VERBS.get(drift.kind, f"changed its {drift.kind}")
    if drift.kind == "optimizer":
        verb = f"was {'taken out of' if drift.before else 'put into'} the optimizer"
    what = what_changed(drift)
    return f"{drift.name or 'The model'} {verb}{_when(drift)}" + (f": {what}." if what else ".")


def what_changed(drift: Drift, *, short: bool = False) -> str:
    """What changed, without the name; `short` for a table."""
    before, after = drift.before, drift.after
    if drift.kind == "value":
        return _elements(drift, short)
    if drift.kind == "aliasing":
        return f"now with {after or 'no other'}, before with {before or 'no other'}"
    if drift.kind == "unverified":
        return str(after or "")
    if drift.kind == "added":
        return f"a {after or 'tensor'} that was not there"
    return "" if drift.kind in ("optimizer", "grad", "removed") else f"{before} → {after}"


def _elements(drift: Drift, short: bool) -> str:
    if drift.changed is None:
        return "its SHA-256 differs" if drift.before is None else f"{drift.before}"
    before, after = str(drift.before), str(drift.after)
    if isinstance(drift.before, float) and isinstance(drift.after, float):
        # Just enough digits to show the difference.
        for digits in (3, 6, 9):
            texts = f"{drift.before:.{digits}g}", f"{drift.after:.{digits}g}"
            if texts[0] != texts[1]:
                before, after = texts
                break
    if drift.total == 1:
        return f"{before} → {after}"
    index = ", ".join(map(str, drift.first_index or ()))
    largest = "" if drift.max_abs is None else f"{drift.max_abs:.3g}"
    if short:
        text = f"{drift.changed} of {drift.total}, [{index}] {before} → {after}"
        return text + (largest and f", up to {largest}")
    verb = "differs" if drift.changed == 1 else "differ"
    text = f"{drift.changed} of {drift.total} elements {verb}, first at [{index}] "
    return text + f"({before} → {after})" + (largest and f", largest change {largest}")


def _when(drift: Drift) -> str:
    where = "" if drift.rank is None else f" on rank {drift.rank}"
    where += f" in {drift.operation}" if drift.operation else ""
    where += f", called at {drift.where}" if drift.where else ""
    step, since = drift.step, drift.since
    if step is None:
        return where
    if since is None or since == step - 1:
        return f" at step {step}{where}"
    if since < step:
        return f" between steps {since + 1} and {step}{where}"
    return (f" after step {step}" if step else " before the first optimizer step") + where


class DriftError(BnfreezeError, AssertionError):
    """Something frozen has changed.

    Attributes:
        report: the `DriftReport`, or None.
    """

    def __init__(self, message: str = "", report: DriftReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class DriftReport(Printable):
    """What `verify` found.

    Attributes:
        drifts: the changes, in the model's order.
        checked: how many tensors were compared, each counted once, however many names it has.
        notes: what the comparison does not show.
        findings: of a checkpoint, what loading it would run.
    """

    drifts: tuple[Drift, ...]
    checked: int
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether something was compared, nothing has changed, and no finding is an error."""
        errors = any(finding.level == "error" for finding in self.findings)
        return not self.drifts and self.checked > 0 and not errors

    def __repr__(self) -> str:
        # Short: pytest cuts a longer one when it explains `assert verify(model, before)`.
        text = self.verdict
        if self.drifts:
            first = self.drifts[0]
            text += f" {escaped(sentence(first))} {escaped(first.cause)}".rstrip()
        return encodable(f"<DriftReport: {shorten(text, 215, placeholder=' …')}>")

    @property
    def message(self) -> str:
        """The first change in full, of values if there is one, and how many more of which kind."""
        if not self.drifts:
            return self.verdict
        first, *others = sorted(self.drifts, key=lambda drift: drift.kind != "value")
        lines = [sentence(first), f"{first.cause} {first.remedy}".strip()]
        if others:
            kinds = Counter(drift.kind for drift in others).most_common()
            tally = ", ".join(f"{count} × {kind}" for kind, count in kinds)
            lines.append(f"And {len(others)} more: {tally}.")
        return "\n".join(escaped(line) for line in lines if line)

    @property
    def verdict(self) -> str:
        """One line that sums up."""
        tensors = counted(self.checked, "tensor")
        if self.drifts:
            return f"{counted(len(self.drifts), 'drift')}; {tensors} compared."
        if not self.checked:
            return "Nothing was compared."
        return f"{tensors} unchanged, bit for bit{'' if self.ok else '; the file would run code'}."

    def raise_if_drifted(self) -> None:
        """Raise the report as a `DriftError` unless it is ok."""
        __tracebackhide__ = True
        if not self.ok:
            raise DriftError(self.message, self)

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        return {
            "schema": 2,
            "ok": self.ok,
            "checked": self.checked,
            "drifts": [drift.to_dict() for drift in self.drifts],
            "notes": list(self.notes),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        rows = [
            (
                drift.name or "(the model)",
                drift.kind,
                "" if drift.step is None else str(drift.step),
                "" if drift.rank is None else str(drift.rank),
                what_changed(drift, short=True) or sentence(drift),
            )
            for drift in self.drifts
        ]
        findings = [
            Finding("error", drift.kind, drift.name, drift.cause, drift.remedy)
            for drift in self.drifts
            if drift.cause
        ]
        findings += self.findings
        columns = ("tensor", "kind", "step", "rank", "what changed")
        verdict = " ".join([self.verdict, *self.notes])
        return Sheet(
            "What drifted" if rows else "", columns, rows, findings, verdict, places="names"
        )
