"""What `inspect` gives, of a live model and of a checkpoint alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bnfreeze.findings import Finding
from bnfreeze.tables import Printable

__all__ = ["Inspection"]


@dataclass(frozen=True)
class Inspection(Printable):
    """The norm layers that were looked at, and what there is to know about them.

    Printing it gives a table; `to_dict` gives the same facts for JSON. A layer of a live model
    says what it will do (`bnfreeze.inspection.behaviour.LayerFacts`); one in a checkpoint, what its
    tensors hold (`bnfreeze.inspection.stored_layers.StoredLayer`).
    """

    layers: tuple[Any, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no finding of level ``"error"``."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        return {
            "schema": 1,
            "ok": self.ok,
            "layers": [asdict(layer) for layer in self.layers],
            "findings": [finding.to_dict() for finding in self.findings],
        }
