"""What `inspect` returns, for a live model and for a checkpoint alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bnfreeze.findings import Finding
from bnfreeze.tables import Printable

__all__ = ["Inspection"]


@dataclass(frozen=True, repr=False)
class Inspection(Printable):
    """The norm layers of a model or a checkpoint, and what there is to know about them.

    It is true if `ok`. Printing it gives a table; `to_dict` gives the same facts for JSON.

    Attributes:
        layers: of a live model `bnfreeze.LiveLayer`, which says what the layer will do; of a
            checkpoint `bnfreeze.StoredLayer`, which says what its tensors hold.
        findings: the worst first.
    """

    layers: tuple[Any, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no finding of level ``"error"``."""
        return not any(finding.level == "error" for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        return {
            "schema": 2,
            "ok": self.ok,
            "layers": [asdict(layer) for layer in self.layers],
            "findings": [finding.to_dict() for finding in self.findings],
        }
