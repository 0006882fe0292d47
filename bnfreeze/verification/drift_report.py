"""All changes between two states, as data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bnfreeze.errors import BnfreezeError
from bnfreeze.findings import Finding
from bnfreeze.tables import Printable, Sheet, escaped
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.messages import message_of, sentence, what_changed

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
    """

    drifts: tuple[Drift, ...]
    checked: int
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether something was compared and nothing has changed."""
        return not self.drifts and self.checked > 0

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        # Short: pytest cuts a longer one when it explains `assert verify(model, before)`.
        text = self.verdict
        if self.drifts:
            text += " " + escaped(sentence(self.drifts[0]))
            text += f" {escaped(self.drifts[0].cause)}".rstrip()
        return f"<DriftReport: {text if len(text) <= 215 else text[:214] + '…'}>"

    @property
    def message(self) -> str:
        """The first change in full, and how many more there are; or that there is none."""
        return message_of(self.drifts) if self.drifts else self.verdict

    @property
    def verdict(self) -> str:
        """One line that sums up."""
        tensors = f"{self.checked} tensor{'s' if self.checked != 1 else ''}"
        if self.drifts:
            count = len(self.drifts)
            drifts = f"{count} drift{'s' if count != 1 else ''}"
            return f"{drifts}; {tensors} compared."
        if not self.checked:
            return "Nothing was compared."
        return f"{tensors} unchanged, bit for bit."

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
        columns = ("tensor", "kind", "step", "rank", "what changed")
        verdict = " ".join([self.verdict, *self.notes])
        title = "What drifted" if rows else ""
        return Sheet(title, columns, rows, findings, verdict)
