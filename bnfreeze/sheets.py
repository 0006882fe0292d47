"""What a report shows, whatever draws it: a table, its findings and one line that sums up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Final

from bnfreeze.findings import Finding, Level
from bnfreeze.histograms import Histogram

__all__ = [
    "MOST_ROWS",
    "Cell",
    "FindingGroup",
    "Row",
    "Sheet",
    "filled_columns",
    "finding_groups",
    "grouped",
    "outline",
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
# How many names must share a beginning to be put under a heading of their own, by depth.
_ENOUGH: Final = (4, 8)

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
        text: a heading, or the name as far as the headings above do not say it.
        name: the whole name; empty for a heading.
        cells: the other cells; none for a heading.
    """

    depth: int
    text: str
    name: str = ""
    cells: tuple[Cell, ...] = ()


def tree_rows(sheet: Sheet, *, flat: bool = False) -> list[Row]:
    """The rows of a sheet, at most `MOST_ROWS`, with headings for names that begin alike.

    Args:
        sheet: what to show.
        flat: without headings but those that the sheet has itself.
    """
    rows: list[Row] = []
    depth = 0
    for heading, part in groupby(
        sheet.rows[:MOST_ROWS], lambda cells: len(cells) < len(sheet.columns)
    ):
        if heading:
            rows += [Row(0, str(cells[0])) for cells in part]
            depth = 1
            continue
        cells = list(part)
        names = [str(name) for name, *_ in cells]
        lines = ((0, name, i) for i, name in enumerate(names)) if flat else outline(names)
        rows += [
            Row(depth + below, text)
            if i is None
            else Row(depth + below, text, names[i], cells[i][1:])
            for below, text, i in lines
        ]
    return rows


def filled_columns(rows: Sequence[Row]) -> list[int]:
    """The indices of the cells that say something in some row; other columns are left out."""
    columns = zip(*(row.cells for row in rows if row.name), strict=True)
    return [index for index, cells in enumerate(columns) if any(cells)]


def outline(names: Sequence[str]) -> Iterator[tuple[int, str, int | None]]:
    """Lines of a tree: headings, and names shortened by the headings above them.

    Args:
        names: dotted names; those that belong together stand together.

    Yields:
        how far a line is indented, its text, and the index of its name; None for a heading.
    """
    return _outline([(name.split("."), index) for index, name in enumerate(names)], 0)


def _outline(
    entries: list[tuple[list[str], int]], depth: int
) -> Iterator[tuple[int, str, int | None]]:
    for _, group in groupby(entries, lambda entry: _beginning(entry[0])):
        run = list(group)
        shared = _shared([parts for parts, _ in run], 1)
        if depth < len(_ENOUGH) and shared and len(run) >= _ENOUGH[depth]:
            yield depth, ".".join(run[0][0][:shared]), None
            yield from _outline([(parts[shared:], index) for parts, index in run], depth + 1)
        else:
            yield from ((depth, ".".join(parts), index) for parts, index in run)


def _beginning(parts: list[str]) -> list[str]:
    """Up to the first segment that is no number: numbers say nothing without the word after."""
    words = (i for i, part in enumerate(parts, 1) if not part.isdigit())
    return parts[: next(words, len(parts))]


def _shared(names: Sequence[list[str]], spare: int) -> int:
    """How many leading segments all have in common, if each keeps `spare` segments at its end."""
    alike = takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return max(min(len(list(alike)), min(map(len, names)) - spare), 0)


def grouped(names: Sequence[str]) -> dict[str, list[int]]:
    """The indices of names by the first segment in which the names differ."""
    split = [name.split(".") for name in names]
    # The tensors' own names (weight, bias) must not make groups.
    shared = _shared(split, 2) if split else 0
    groups: dict[str, list[int]] = {}
    for index, parts in enumerate(split):
        groups.setdefault(".".join(parts[: shared + 1]), []).append(index)
    return groups


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
