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

from bnfreeze.findings import KINDS, Finding
from bnfreeze.histograms import Histogram
from bnfreeze.sheets import MOST_ROWS, Cell, Row, Sheet, finding_groups, table_of, tone
from bnfreeze.text import escaped

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
    findings = [_finding(*group, sheet.places) for group in finding_groups(sheet.findings)]
    table = [_table(sheet)] if sheet.rows else []
    parts = [
        f"<h2>{_text(sheet.title)}</h2>" if sheet.title else "",
        *(f'<p class="dim">{_text(note)}</p>' for note in sheet.notes),
        *([*findings, *table] if sheet.findings_first else [*table, *findings]),
        f'<p class="verdict">{_text(sheet.verdict)}</p>',
    ]
    return f'<section class="bnfreeze">{"".join(parts)}</section>'


def _table(sheet: Sheet) -> str:
    headings, rows = table_of(sheet, tree=sheet.outlined is not False)
    columns = list(zip(*(row.cells for row in rows if row.cells), strict=True))
    right = [all(str(cell or "0").isdigit() for cell in column) for column in columns]

    def heading(i: int) -> str:
        if any(isinstance(cell, Histogram) for cell in columns[i]):
            ends = "".join(f"<span>{_text(end)}</span>" for end in headings[i].split())
            return f'<th class="axis"><span class="ends">{ends}</span>'
        return f"<th{_attribute('class', 'number' if right[i] else '')}>{_text(headings[i])}"

    def line(row: Row) -> str:
        depth = _attribute("data-depth", str(row.depth or ""))
        if not row.cells:
            return f'<tr class="branch"{depth}><th colspan="{len(headings)}">{_text(row.text)}'
        name, *cells = row.cells
        whole = _attribute("data-name", str(name) if name != row.text else "")
        rest = "".join(map(_cell, cells, headings[1:], right[1:]))
        return f'<tr{depth}><th scope="row"{whole}>{_text(row.text)}</th>{rest}'

    more = len(sheet.rows) - MOST_ROWS
    return (
        f'<div class="scroll"><table><thead><tr><th>{_text(headings[0])}'
        f"{''.join(map(heading, range(1, len(headings))))}</tr></thead>\n<tbody>"
        + "\n".join(map(line, rows))
        + "</tbody></table></div>"
        + (f'<p class="dim">... and {more:,} rows more</p>' if more > 0 else "")
        + (f'<p class="legend">{_text(sheet.legend)}</p>' if sheet.legend else "")
    )


def _cell(cell: Cell, label: str, right: bool) -> str:
    if isinstance(cell, Histogram):
        return f'<td class="bars" data-value="{cell.median:g}">{_histogram(cell)}</td>'
    kind = _attribute("class", "number" if right else tone(cell))
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


def _finding(first: Finding, message: str, found: list[tuple[str, str]], what: str) -> str:
    places = [_text(name) for name, _ in found]
    where = ", ".join(places) if len(places) <= _FEW else f"{len(places)} {what}"
    if len(found) == 1 or (message and len(found) <= _FEW):
        seen = _text(first.message)
    else:
        items = [_text(name if message else f"{name}: {own}") for name, own in found]
        some = f"{', '.join(places[:2])}{', …' if len(items) > 2 else ''}"
        left = [f"<li>... and {len(items) - MOST_ROWS:,} more"] if len(items) > MOST_ROWS else []
        listed = "".join([*(f"<li>{item}" for item in items[:MOST_ROWS]), *left])
        seen = f"{_text(message)}<details><summary>{some}</summary><ul>{listed}</ul></details>"
    meaning = ""
    if kind := KINDS.get(first.code):  # what the documentation says of it
        example = "\n".join(map(_text, kind.example.splitlines()))
        meaning = (
            f"<details><summary>{_text(kind.title)}: what it means</summary>"
            f"<p>{_text(kind.meaning)}<p>{_text(kind.why)}<pre>{example}</pre></details>"
        )
    return (
        f'<div class="finding"><p><span class="{first.level}">{first.level}</span> '
        f"<b>{_text(first.code)}</b> {where}</p><div>{seen}</div>"
        f'<p class="dim">→ {_text(first.remedy)}</p>{meaning}</div>'
    )
