"""What a report shows, whatever draws it: a table, its findings and one line that sums up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bnfreeze.findings import Finding, Level
from bnfreeze.tree import Histogram, outline

__all__ = [
    "MOST_ROWS",
    "Cell",
    "FindingGroup",
    "Row",
    "Sheet",
    "finding_groups",
    "shared_kind",
    "tone",
    "tree_rows",
]

# Nobody reads a longer table.
MOST_ROWS: Final = 2_000

# What a word means for a person who wants the layer frozen.
_TONES: Final = {
    "frozen": "good",
    "still": "good",
    "running": "good",
    "identical": "good",
    "fits": "good",
    "uncertain": "warning",
    "shifted": "error",
    "update": "warning",
    "train": "warning",
    "batch": "warning",
    "unknown": "warning",
    "moved": "warning",
    "differ": "error",
    "missing": "error",
    "unread": "error",
}

Cell = str | Histogram


@dataclass(frozen=True)
class Sheet:
    """A table, the findings under it and one line that sums up.

    Attributes:
        title: what the table shows.
        columns: the headings; the first column names the layer.
        rows: a cell for each column; or a single cell: the heading of the rows below it.
        findings: shown under the table, those of one kind together.
        verdict: the last line.
        further: the columns that only a wide terminal shows.
        notes: lines under the title.
        findings_first: whether the findings stand before the table.
        outlined: whether the names are shown as a tree; None for a tree on a page of HTML and
            whole names on a terminal.
        legend: what the columns mean; a line under the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    findings: Sequence[Finding]
    verdict: str
    further: frozenset[str] = frozenset()
    notes: Sequence[str] = ()
    findings_first: bool = False
    outlined: bool | None = None
    legend: str = ""


def shared_kind(title: str, kinds: Sequence[str]) -> tuple[str, frozenset[str]]:
    """Put the kind of layer in the title if all have one, and its column on wide terminals only."""
    if len(set(kinds)) == 1:
        return f"{title} · {len(kinds)} × {kinds[0]}", frozenset({"kind"})
    return title, frozenset()


def tone(cell: str) -> str:
    """``"good"``, ``"warning"``, ``"error"`` or, for most words, an empty text."""
    # "12 of 40 moved" has the tone of its last word.
    return _TONES.get(cell.rpartition(" ")[2], "")


@dataclass(frozen=True)
class Row:
    """A row of a tree.

    Attributes:
        depth: how far it is indented.
        text: its heading, or the name as far as the headings above do not say it.
        name: the whole name; empty for a heading.
        cells: the other cells; none for a heading.
        heading: whether it stands for the rows below it, not for a layer.
    """

    depth: int
    text: str
    name: str = ""
    cells: tuple[Cell, ...] = ()
    heading: bool = False


def tree_rows(sheet: Sheet, *, flat: bool = False) -> Iterator[Row]:
    """The rows of a sheet, at most `MOST_ROWS`, with headings for names that begin alike.

    Args:
        sheet: what to show.
        flat: without headings but those that the sheet has itself.
    """
    rows = sheet.rows[:MOST_ROWS]
    headed = len(sheet.columns) > 1
    starts = [i for i, row in enumerate(rows) if headed and len(row) == 1]
    for start, end in zip([-1, *starts], [*starts, len(rows)], strict=True):
        depth = 0
        if start >= 0:
            yield Row(0, str(rows[start][0]), heading=True)
            depth = 1
        part = rows[start + 1 : end]
        names = [str(row[0]) for row in part]
        lines = zip(names, range(len(names)), strict=True) if flat else outline(names)
        for line, index in lines:
            text = line if flat else line.lstrip(" ")
            below = depth + (len(line) - len(text)) // 2
            if index is None:
                yield Row(below, text, heading=True)
            else:
                yield Row(below, text, names[index], part[index][1:])


@dataclass(frozen=True)
class FindingGroup:
    """Findings that differ in the layer and in their numbers alone.

    Attributes:
        level: of all of them.
        code: of all of them.
        remedy: of all of them.
        message: what was seen, if it is the same in all of them; else empty.
        places: in which layer each was found, and its message.
    """

    level: Level
    code: str
    remedy: str
    message: str
    places: tuple[tuple[str, str], ...]


def finding_groups(findings: Sequence[Finding]) -> list[FindingGroup]:
    """Put findings of one kind together, in the order of the first of each."""
    several = len({one.key for one in findings if one.name}) > 1

    def place(one: Finding) -> str:
        name = one.name or "(the model)"
        return f"{one.key or '(top)'}: {name}" if several and one.name else name

    groups: dict[tuple[Level, str, str, str], list[Finding]] = {}
    for one in findings:
        message = re.sub(r"[\d.]+", "#", one.message)
        groups.setdefault((one.level, one.code, one.remedy, message), []).append(one)
    return [
        FindingGroup(
            level,
            code,
            remedy,
            group[0].message if len({one.message for one in group}) == 1 else "",
            tuple((place(one), one.message) for one in group),
        )
        for (level, code, remedy, _), group in groups.items()
    ]
