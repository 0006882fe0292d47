"""Draws sheets as HTML: one page without network, or a fragment for a notebook.

Without scripts it is a table. The script adds sorting, filtering and folding. All text is escaped;
the page's policy lets no other script run, and nothing be fetched.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Final

from bnfreeze.findings import KINDS, FindingKind
from bnfreeze.histograms import Histogram
from bnfreeze.sheets import (
    MOST_ROWS,
    Cell,
    FindingGroup,
    Row,
    Sheet,
    filled_columns,
    finding_groups,
    tone,
    tree_rows,
)
from bnfreeze.text import escaped

__all__ = ["fragment", "page"]

# So many layers of a finding are shown without a click.
_FEW: Final = 3


def page(sheets: Sequence[Sheet]) -> str:
    """A page of its own, which shows the sheets one under the other."""
    script = _part("report.js")
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = _text(", ".join(sheet.title for sheet in sheets if sheet.title)[:200] or "report")
    style = _part("report.css") + _part("report_page.css")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>bnfreeze: {title}</title><style>{style}</style></head><body>\n"
        + "\n".join(_report(sheet) for sheet in sheets)
        + f"\n<script>{script}</script></body></html>\n"
    )


def fragment(sheet: Sheet) -> str:
    """A part of a page, such as the output of a cell in a notebook."""
    return (
        f"<style>{_part('report.css')}</style>{_report(sheet)}<script>{_part('report.js')}</script>"
    )


def _part(name: str) -> str:
    return files("bnfreeze").joinpath(name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    return escape(escaped(text))


def _report(sheet: Sheet) -> str:
    findings = [_finding(group) for group in finding_groups(sheet.findings)]
    table = [_table(sheet)] if sheet.rows else []
    parts = [
        f"<h2>{_text(sheet.title)}</h2>" if sheet.title else "",
        *(f'<p class="dim">{_text(note)}</p>' for note in sheet.notes),
        *([*findings, *table] if sheet.findings_first else [*table, *findings]),
        f'<p class="verdict">{_text(sheet.verdict)}</p>',
    ]
    return f'<section class="bnfreeze">{"".join(parts)}</section>'


def _table(sheet: Sheet) -> str:
    rows = tree_rows(sheet, flat=sheet.outlined is False)
    leaves = [row.cells for row in rows if row.name]
    shown = filled_columns(rows)
    right = {i for i in shown if all(str(cells[i] or "0").isdigit() for cells in leaves)}
    pictures = {i for i in shown if any(isinstance(cells[i], Histogram) for cells in leaves)}

    def heading(i: int) -> str:
        name = sheet.columns[i + 1]
        if i in pictures:
            ends = "".join(f"<span>{_text(end)}</span>" for end in name.split())
            return f'<th class="axis"><span class="ends">{ends}</span>'
        return f"<th{_attribute('class', 'number' if i in right else '')}>{_text(name)}"

    def line(row: Row) -> str:
        depth = _attribute("data-depth", str(row.depth or ""))
        if not row.name:
            return f'<tr class="branch"{depth}><th colspan="{len(shown) + 1}">{_text(row.text)}'
        name = _attribute("data-name", row.name if row.name != row.text else "")
        cells = (
            _cell(row.cells[i], sheet.columns[i + 1], "number" if i in right else "") for i in shown
        )
        return f'<tr{depth}><th scope="row"{name}>{_text(row.text)}</th>{"".join(cells)}'

    more = len(sheet.rows) - MOST_ROWS
    return (
        f'<div class="scroll"><table><thead><tr><th>{_text(sheet.columns[0])}'
        f"{''.join(map(heading, shown))}</tr></thead>\n<tbody>"
        + "\n".join(map(line, rows))
        + "</tbody></table></div>"
        + (f'<p class="dim">... and {more:,} rows more</p>' if more > 0 else "")
        + (f'<p class="legend">{_text(sheet.legend)}</p>' if sheet.legend else "")
    )


def _cell(cell: Cell, label: str, kind: str) -> str:
    if isinstance(cell, Histogram):
        return f'<td class="bars" data-value="{cell.median:g}">{_histogram(cell)}</td>'
    kind = _attribute("class", kind or tone(cell))
    return f"<td{kind}{_attribute('data-label', label if cell else '')}>{_text(cell)}</td>"


def _attribute(name: str, value: str) -> str:
    return f' {name}="{_text(value)}"' if value else ""


def _histogram(values: Histogram) -> str:
    """A small picture: a bar for each bin, and what is in it when the mouse is over it."""
    bars = "".join(
        f"M{i} 8v-{height}h.85v{height}z" for i, height in enumerate(values.heights()) if height
    )
    hints = "".join(
        f'<rect x="{i}" width="1" height="8"><title>{values.edges[i]:.2g} to '
        f"{values.edges[i + 1]:.2g}: {share:.0%}</title></rect>"
        for i, share in enumerate(values.shares)
        if share
    )
    return (
        f"<i>{'&lt;' if values.below else ''}</i>"
        f'<svg viewBox="0 0 {len(values.shares)} 8" preserveAspectRatio="none" role="img" '
        f'aria-label="median {values.median:.2g}"><path d="{bars}"/>{hints}</svg>'
        f"<i>{'&gt;' if values.above else ''}</i>"
    )


def _finding(group: FindingGroup) -> str:
    places = [_text(name) for name, _ in group.places]
    where = ", ".join(places) if len(places) <= _FEW else f"{len(places)} layers"
    items = [
        name if group.message else f"{name}: {_text(message)}"
        for name, (_, message) in zip(places, group.places, strict=True)
    ]
    if len(items) == 1 or (group.message and len(items) <= _FEW):
        seen = _text(group.places[0][1])
    else:
        some = f"{', '.join(places[:2])}{', …' if len(items) > 2 else ''}"
        left = [f"<li>... and {len(items) - MOST_ROWS:,} more"] if len(items) > MOST_ROWS else []
        listed = "".join([*(f"<li>{item}" for item in items[:MOST_ROWS]), *left])
        seen = (
            f"{_text(group.message)}<details><summary>{some}</summary><ul>{listed}</ul></details>"
        )
    kind = KINDS.get(group.code)
    return (
        f'<div class="finding"><p><span class="{group.level}">{group.level}</span> '
        f"<b>{_text(group.code)}</b> {where}</p><div>{seen}</div>"
        f'<p class="dim">→ {_text(group.remedy)}</p>{_meaning(kind) if kind else ""}</div>'
    )


def _meaning(kind: FindingKind) -> str:
    """What the documentation says of a code."""
    example = "\n".join(map(_text, kind.example.splitlines()))
    return (
        f"<details><summary>{_text(kind.title)}: what it means</summary><p>{_text(kind.meaning)}"
        f"<p>{_text(kind.why)}<pre>{example}</pre></details>"
    )
