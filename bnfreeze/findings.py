"""Findings: what a person should know about a norm layer, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["Finding", "Level", "by_gravity"]

Level = Literal["error", "warning", "note"]

_GRAVITY: dict[str, int] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """Something noticed: how grave, which kind, where, and how to mend it.

    Attributes:
        level: ``"error"``, ``"warning"`` or ``"note"``.
        code: a stable name of the kind, such as ``"never-trained"``.
        layer: the layer's dotted name; empty for the model as a whole.
        message: what was seen.
        remedy: what to do about it.
    """

    level: Level
    code: str
    layer: str
    message: str
    remedy: str

    def to_dict(self) -> dict[str, str]:
        """The five fields, for JSON."""
        return asdict(self)


def by_gravity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes; otherwise as they came."""
    return tuple(sorted(findings, key=lambda finding: _GRAVITY[finding.level]))
