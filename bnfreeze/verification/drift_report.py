"""All changes between two states, as data that prints as a table. Needs no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from bnfreeze.errors import BnfreezeError
from bnfreeze.findings import Finding
from bnfreeze.sheets import Sheet
from bnfreeze.tables import Printable
from bnfreeze.text import encodable, escaped
from bnfreeze.verification.drift import Drift, sentence, what_changed

__all__ = ["DriftError", "DriftReport"]


class DriftError(BnfreezeError, AssertionError):
    """Something frozen has changed.

    Attributes:
        report: the `DriftReport`, or None.
    """

    def __init__(self, message: str = "", report: DriftReport | None = None) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[type[DriftError], tuple[str, DriftReport | None]]:
        # Pickle's own way to rebuild an exception would lose the report.
        return (type(self), (str(self), self.report))


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

    def __bool__(self) -> bool:
        return self.ok

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
        tensors = f"{self.checked} tensor{'s' if self.checked != 1 else ''}"
        if self.drifts:
            count = len(self.drifts)
            return f"{count} drift{'s' if count != 1 else ''}; {tensors} compared."
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
                what_changed(drift) or sentence(drift),
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
        return Sheet("What drifted" if rows else "", columns, rows, findings, verdict)
