"""What a report shows, whatever draws it: a table, its findings and one line that sums up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Final, NamedTuple

from bnfreeze.findings import Finding
from bnfreeze.histograms import Histogram

# Nobody reads a longer table.
MOST_ROWS: Final = 2_000

# What a word means for a person who wants the layer frozen.
_TONES: Final = {
    "frozen": "good",
    "fixed": "good",
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
        places: what the findings name.
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
    places: str = "layers"


def shared_kind(title: str, kinds: Sequence[str]) -> tuple[str, frozenset[str]]:
    """Put the kind of layer in the title if all have one, and its column on wide terminals only."""
    if len(set(kinds)) == 1:
        return f"{title} · {len(kinds)} × {kinds[0]}", frozenset({"kind"})
    return title, frozenset()


def tone(cell: str) -> str:
    """``"good"``, ``"warning"``, ``"error"`` or, for most words, an empty text."""
    # "12 of 40 moved" has the tone of its last word.
    return _TONES.get(cell.rpartition(" ")[2], "")


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        depth: how far it is indented.
        text: a heading, or the name as far as the headings above do not say it.
        cells: the whole name and the other cells; none for a heading.
    """

    depth: int
    text: str
    cells: tuple[Cell, ...] = ()


def table_of(sheet: Sheet, *, tree: bool, wide: bool = True) -> tuple[list[str], list[Row]]:
    """The headings of a sheet's columns and its rows, at most `MOST_ROWS`.

    Columns are left out that say nothing in any row.

    Args:
        sheet: what to show.
        tree: whether names that begin alike are put under a heading, besides those that the sheet
            has itself.
        wide: whether to show its further columns, too.
    """
    rows: list[Row] = []
    depth = 0
    for heading, part in groupby(
        sheet.rows[:MOST_ROWS], lambda cells: len(cells) < len(sheet.columns)
    ):
        if heading:
            rows += [Row(0, str(cells[0])) for cells in part]
            depth = 1
        elif tree:
            rows += outline([*part], depth)
        else:
            rows += [Row(depth, str(cells[0]), cells) for cells in part]
    filled = zip(*(row.cells for row in rows if row.cells), strict=True)
    shown = [
        i
        for i, cells in enumerate(filled)
        if i == 0 or (any(cells) and (wide or sheet.columns[i] not in sheet.further))
    ]
    return [sheet.columns[i] for i in shown or [0]], [
        row._replace(cells=tuple(row.cells[i] for i in shown if row.cells)) for row in rows
    ]


def outline(
    rows: Sequence[tuple[Cell, ...]],
    depth: int = 0,
    above: int = 0,
    enough: tuple[int, ...] = (4, 8),
) -> Iterator[Row]:
    """The rows as a tree, with headings, and names shortened by the headings above them.

    Args:
        rows: begin with dotted names; those that belong together stand together.
        depth: of the outermost.
        above: how many segments of their names the headings above say.
        enough: how many names must share a beginning to be put under a heading, by depth.
    """

    def parts(cells: tuple[Cell, ...]) -> list[str]:
        return str(cells[0]).split(".")[above:]

    for _, group in groupby(rows, lambda cells: _beginning(parts(cells))):
        run = list(group)
        shared = _shared([*map(parts, run)], 1)
        if enough and shared and len(run) >= enough[0]:
            yield Row(depth, ".".join(parts(run[0])[:shared]))
            yield from outline(run, depth + 1, above + shared, enough[1:])
        else:
            yield from (Row(depth, ".".join(parts(cells)), cells) for cells in run)


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


def finding_groups(
    findings: Sequence[Finding],
) -> Iterator[tuple[Finding, str, list[tuple[str, str]]]]:
    """Put findings together that differ in the layer and in their numbers alone.

    Yields:
        the first of them, which has the level, code and remedy of all; what was seen, if it is the
        same in all, else an empty text; and in which layer each was found, with its message.
    """
    several = len({one.key for one in findings if one.name}) > 1
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for one in findings:
        message = re.sub(r"[\d.]+", "#", one.message)
        groups.setdefault((one.level, one.code, one.remedy, message), []).append(one)
    for first, *others in groups.values():
        same = all(one.message == first.message for one in others)
        places = []
        for one in (first, *others):
            model = f"{one.key or '(top)'}: " if several and one.name else ""
            places.append((model + (one.name or "(the model)"), one.message))
        yield first, first.message if same else "", places
