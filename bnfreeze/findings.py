"""Findings: what a person should know about a norm layer, as data.

What each code means stands in `bnfreeze.finding_kinds`, and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final

from bnfreeze.errors import BnfreezeError
from bnfreeze.finding_kinds import KINDS, FindingKind, Level

__all__ = ["Finding", "Level", "finding", "finding_kind", "worst_first"]

_BY_CODE: Final = {kind.code: kind for kind in KINDS}
_ORDER: Final[dict[str, int]] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """Something that a person should know about a layer, and how to mend it.

    Attributes:
        level: ``"error"``, ``"warning"`` or ``"note"``.
        code: a stable name of the kind, such as ``"never-trained"``, which
            ``bnfreeze explain`` explains.
        name: the layer's dotted name; empty for the model as a whole.
        message: what was seen.
        remedy: what to do about it.
        key: in a checkpoint, the dotted key of the layer's model; empty at the top.
    """

    level: Level
    code: str
    name: str
    message: str
    remedy: str
    key: str = ""

    def to_dict(self) -> dict[str, str]:
        """The six fields, for JSON."""
        return asdict(self)


def finding(
    code: str,
    name: str,
    message: str = "",
    remedy: str = "",
    *,
    level: Level | None = None,
    key: str = "",
) -> Finding:
    """Make a finding of a registered kind.

    Args:
        code: a code of `bnfreeze.finding_kinds.KINDS`.
        name: the layer's dotted name; empty for the model as a whole.
        message: what was seen; empty for the kind's title.
        remedy: what to do about it; empty for the kind's own remedy.
        level: one of the kind's levels; None for its usual one.
        key: in a checkpoint, the dotted key of the layer's model.

    Raises:
        KeyError: the code is not registered.
        ValueError: findings of this kind do not have this level.
    """
    kind = _BY_CODE[code]
    if level is not None and level not in kind.levels:
        raise ValueError(f"A finding {code!r} has the level {' or '.join(kind.levels)}.")
    return Finding(
        level or kind.levels[0], code, name, message or f"{kind.title}.", remedy or kind.remedy, key
    )


def finding_kind(code: str) -> FindingKind:
    """Say what a code means.

    Raises:
        BnfreezeError: there is no such code; names the nearest.
    """
    if found := _BY_CODE.get(code.strip().lower()):
        return found
    close = difflib.get_close_matches(code.lower(), _BY_CODE, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise BnfreezeError(f"No finding has the code {code!r}.{hint} 'bnfreeze explain' lists all.")


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes; otherwise as they came."""
    return tuple(sorted(findings, key=lambda one: _ORDER[one.level]))
