"""Records as tables, in a terminal or as Markdown.

The page of the docs: `python -m benchmarks.report benchmarks/results/*.json > docs/benchmarks.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import runs
from benchmarks.facts import Record, Run

TITLES = {
    "layer": "The layer alone, in the shapes of a ResNet-50",
    "host": "A call on eight elements",
    "block": "A bottleneck block, forward and backward",
    "step": "A training step of a ResNet-50",
    "folded": "Frozen parts of a model",
    "detection": "A training step of a detector's ResNet-50 with feature pyramid",
    "detector": "A training step of Faster R-CNN",
    "memory": "Memory of a ResNet-50 at 224 × 224",
    "guard": "What verifying costs",
    "calibration": "What `probe` and `recalibrate` cost",
    "inspect": "What `bnfreeze inspect` costs",
    "cold": "The first call of the CUDA kernel",
}
# These become columns; every other value of a case makes a table of its own.
_COLUMNS = ("precision", "layout", "malloc", "call", "file")
# How the values and the names of a case are written in a title.
_WORDS = {"nothing": "batch norm alone", "relu": "with ReLU", "add+relu": "with add and ReLU"}
_NAMES = {"what": "", "pass": "", "weights": "convolutions"}
_UNITS = {"x": "", "MiB": " MiB", "%": " %"}


@dataclass(frozen=True)
class Grid:
    """A table: its title, what the figures mean, the headings, and the rows."""

    title: str
    what: str
    columns: tuple[str, ...]
    rows: Mapping[str, Sequence[Record | None]]


def grids(records: Iterable[Record], works: Iterable[str] = TITLES) -> list[Grid]:
    """Make tables of the records of these works.

    A single shape is shown only if compiled arms ran on it; the JSON has all of them.
    """
    records = list(records)
    compiled = {_shape(one) for one in records if one.arm.startswith("compile")}
    found = []
    for work in works:
        mine = [one for one in records if one.work == work and _shape(one) in {"all", *compiled}]
        for key in dict.fromkeys(_table(one) for one in mine):
            here = [one for one in mine if _table(one) == key]
            columns = tuple(dict.fromkeys(_column(one) for one in here))
            cells = {(one.arm, _column(one)): one for one in here}
            arms = dict.fromkeys(one.arm for one in here)
            rows = {arm: [cells.get((arm, column)) for column in columns] for arm in arms}
            *words, unit, base = key
            title = ": ".join(filter(None, (TITLES[work], ", ".join(words))))
            found.append(Grid(title, _what(unit, base), columns, rows))
    return found


def cell(record: Record | None) -> str:
    """Write one figure; the range is from the lower to the upper quartile."""
    if record is None:
        return "–"
    if record.arm == record.base:
        return "1"
    unit, digits = _UNITS[record.unit], _digits(record)
    middle = f"{record.median:.{digits}f}"
    if record.rounds == 1:
        return middle + unit
    return f"{middle}{unit} ({record.low:.{digits}f}–{record.high:.{digits}f})"


def as_markdown(grid: Grid) -> str:
    """Return a Markdown table, without its title."""
    lines = [["", *grid.columns], ["---"] * (len(grid.columns) + 1)]
    lines += [[arm, *map(cell, row)] for arm, row in grid.rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(paths: Sequence[Path]) -> str:
    """Return a Markdown page with the tables of some files.

    A work that is in several of them is shown from the last one.
    """
    parts: list[str] = []
    seen: set[str] = set()
    for path in reversed(paths):
        run = runs.load(path)
        here = [f"Made by `{run.command}`; all figures are in `{path}`.", *about(run)]
        for grid in grids(one for one in run.records if one.work not in seen):
            here.append(f"## {grid.title}")
            here += [f"{grid.what[0].upper()}{grid.what[1:]}."] if grid.what else []
            here.append(as_markdown(grid))
        seen |= {one.work for one in run.records}
        parts = here + parts
    return "\n\n".join(["# Benchmarks", *parts]) + "\n"


def show(run: Run, console: Console) -> None:
    """Print a run: the tables, the machine, and the notes."""
    for grid in grids(run.records):
        console.print(Text(f"\n{grid.title}", style="bold"))
        if grid.what:
            console.print(Text(grid.what, style="dim"))
        for columns in _that_fit(grid, console.width):
            table = Table()
            table.add_column("", no_wrap=True)
            for column in columns:
                table.add_column(grid.columns[column], justify="right", no_wrap=True)
            for arm, row in grid.rows.items():
                style = "bold" if arm.startswith("bnfreeze") else ""
                cells = (Text(cell(row[column])) for column in columns)
                table.add_row(Text(arm, style=style), *cells)
            console.print(table)
    for line in about(run):
        console.print(line, highlight=False, markup=False)


def _that_fit(grid: Grid, width: int) -> Iterable[range]:
    """Split a wide grid: yield the columns of each part."""
    names = max(map(len, grid.rows)) + 4
    widest = max(len(cell(one)) for row in grid.rows.values() for one in row)
    once = max(1, (width - names) // (max(widest, *map(len, grid.columns), 0) + 3))
    for begin in range(0, len(grid.columns), once):
        yield range(begin, min(begin + once, len(grid.columns)))


def about(run: Run) -> list[str]:
    """Return lines on the machine, the versions, and what was left out."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    lines = [f"On {machine(run)}; {versions}; commit {run.commit}."]
    lines += [f"{peer} is {why}" for peer, why in run.absent.items()]
    return [*lines, *run.notes]


def machine(run: Run) -> str:
    """Return the name of the device with its driver or its number of threads."""
    threads, driver = run.device.get("threads"), run.device.get("driver")
    if driver:
        return f"{run.device['name']}, driver {driver}"
    return f"{run.device['name']}, {threads} {'thread' if threads == '1' else 'threads'}"


def _table(record: Record) -> tuple[str, ...]:
    case = record.case
    words = []
    for name, value in case.items():
        if name in _COLUMNS or (name, value) == ("shape", "all"):
            continue
        words.append(_WORDS.get(value) or f"{_NAMES.get(name, name)} {value}".strip())
    return (*words, record.unit, record.base)


def _shape(record: Record) -> str:
    return record.case.get("shape", "all")


def _column(record: Record) -> str:
    named = [record.case[name] for name in _COLUMNS if name in record.case]
    return " ".join(named)


def _what(unit: str, base: str) -> str:
    if unit == "x":
        return f"time divided by that of {base}; median (quartiles) over the rounds"
    return f"per cent of {base}" if base else ""


def _digits(record: Record) -> int:
    if record.unit == "MiB":
        return 1 if record.median < 1000 else 0
    return 3 if record.median < 0.1 and record.unit == "%" else 2


if __name__ == "__main__":
    print(page([Path(name) for name in sys.argv[1:]]), end="")
