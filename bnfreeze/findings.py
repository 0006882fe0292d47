"""Findings: what a person should know about a norm layer, as data.

What is said of each kind stands in `findings.md`, a page for each code, and nowhere else: the pages
of the documentation, `bnfreeze explain CODE` and the check of codes in `finding` are made from it.
To add a finding, add its page to `findings.md` (sorted by code), call `finding("code", ...)` in the
place that detects it, and run ``python docs/make_findings.py``.

A code says first what it is about (``stats-``, ``affine-``, ``layer-``, ``model-``,
``optimizer-``) and then what is wrong with it. Codes that say so by themselves have no such
beginning: ``never-trained``, for example. Codes never change.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.resources import files
from textwrap import dedent
from typing import Any, Final, Literal

from bnfreeze.errors import BnfreezeError

Level = Literal["error", "warning", "note"]
_ORDER: Final[dict[str, int]] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class FindingKind:
    """One kind of finding, as people read about it.

    Attributes:
        code: its stable name.
        levels: the levels that it can have; the first is the usual one.
        title: what was found, in a few words.
        meaning: what it means.
        why: why it matters.
        remedy: how to mend it, in a sentence or two; shown with each finding.
        example: code or a command that leads to it, or that mends it.
    """

    code: str
    levels: tuple[Level, ...]
    title: str
    meaning: str
    why: str
    remedy: str
    example: str


_PAGE: Final = re.compile(
    r"# (?P<code>.+)\n\n\*\*(?P<title>.+)\*\* \(level: (?P<levels>.+)\)\n\n(?P<meaning>.+)\n\n"
    r"## Why it matters\n\n(?P<why>.+)\n\n## How to mend it\n\n(?P<remedy>.+)\n\n"
    r"## Example\n\n(?P<example>(?:    .+\n|\n(?=    ))+)\n?"
)


def _kind(page: re.Match[str]) -> FindingKind:
    fields: dict[str, Any] = page.groupdict()
    fields["levels"] = tuple(fields["levels"].split(" or "))
    fields["example"] = dedent(fields["example"]).rstrip("\n")
    return FindingKind(**fields)


_TEXT: Final = files("bnfreeze").joinpath("findings.md").read_text(encoding="utf-8")
_FOUND: Final = list(_PAGE.finditer(_TEXT))
# Each kind, and the page about it in Markdown, by its code.
KINDS: Final = {page["code"]: _kind(page) for page in _FOUND}
PAGES: Final = {page["code"]: page[0].rstrip() + "\n" for page in _FOUND}


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
        code: a code of `KINDS`.
        name: the layer's dotted name; empty for the model as a whole.
        message: what was seen; empty for the kind's title.
        remedy: what to do about it; empty for the kind's own remedy.
        level: one of the kind's levels; None for its usual one.
        key: in a checkpoint, the dotted key of the layer's model.

    Raises:
        KeyError: the code is not registered.
        ValueError: findings of this kind do not have this level.
    """
    kind = KINDS[code]
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
    if found := KINDS.get(code.strip().lower()):
        return found
    close = difflib.get_close_matches(code.lower(), KINDS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise BnfreezeError(f"No finding has the code {code!r}.{hint} 'bnfreeze explain' lists all.")


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes; otherwise as they came."""
    return tuple(sorted(findings, key=lambda one: _ORDER[one.level]))
