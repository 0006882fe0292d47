"""Draws a report: on a terminal, or as text or SVG; `bnfreeze.html` draws it as a page.

What has the facts lays them out as a `Sheet`; how a sheet looks is decided here. Nothing is read as
markup, control characters are shown escaped, and what an encoding does not have is replaced by
ASCII before the layout, so that columns stay aligned.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from html import escape, unescape
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Final

from bnfreeze.files import write_whole
from bnfreeze.histograms import BLOCKS, Histogram
from bnfreeze.sheets import MOST_ROWS, Cell, Sheet, finding_groups, table_of, tone
from bnfreeze.text import SEGMENT, encodable, stdout_encoding, wrapped

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

# By the tone of a cell (`bnfreeze.sheets.tone`), or the level of a finding.
_STYLES: Final = {"good": "green", "warning": "yellow", "error": "bold red", "note": "cyan"}
# Of findings that differ in their numbers alone, so many are shown with their own.
_MOST_NUMBERS: Final = 8
# From this width on, a sheet's further columns are shown.
_WIDE: Final = 120
# Cells of this length and more are sentences, which may wrap.
_PROSE: Final = 17
_GAP: Final = 2
_LONGEST_REPR: Final = 300
# How wide rich draws a character in an SVG.
_SVG_CELL: Final = 12.2


class Printable(ABC):
    """Facts that give a table when printed, and HTML in a notebook; true unless not ``ok``.

    ``str()`` uses only characters that ``sys.stdout`` can show. A dataclass that is one needs
    ``repr=False``, or it would list every field.
    """

    @abstractmethod
    def sheet(self) -> Sheet:
        """The facts as a sheet."""

    def __bool__(self) -> bool:
        return bool(getattr(self, "ok", True))

    def __str__(self) -> str:
        from rich.console import Console

        # As wide as the terminal, or as COLUMNS says; 80 where neither is known.
        lines = _drawn(self.sheet(), Console().width, stdout_encoding())
        return "\n".join(line.plain for line in lines)

    def __repr__(self) -> str:
        verdict = encodable(self.sheet().verdict)
        verdict = shorten(verdict, _LONGEST_REPR, placeholder=" ...")
        return f"<{type(self).__name__}: {verdict}>"

    def _repr_html_(self) -> str:
        from bnfreeze.html import fragment

        return fragment(self.sheet())

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        return _drawn(self.sheet(), options.max_width, options.encoding)

    def save_html(self, path: str | Path) -> None:
        """Save a page of HTML, whose table sorts, filters and folds; it needs no network."""
        from bnfreeze.html import page

        write_whole(path, page([self.sheet()]))

    def save_svg(self, path: str | Path, *, width: int = 100) -> None:
        """Save the picture as an SVG file, `width` characters wide."""
        write_whole(path, svg_of([self], width=width))


def draw(reports: Sequence[Printable], console: Console) -> None:
    """Print reports on a console, one under the other."""
    for number, report in enumerate(reports):
        if number:
            console.print()
        console.print(report)


def svg_of(reports: Sequence[Printable], *, width: int = _WIDE) -> str:
    """The picture of several, one under the other, as SVG.

    Each word has its own place and a bar is a rectangle: programs that draw SVG differ in fonts and
    in what they do with spaces.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.terminal_theme import SVG_EXPORT_THEME

    def placed(line: re.Match[str]) -> str:
        style, left, base, content = line[1], float(line[2]), float(line[3]), unescape(line[4])
        parts = []
        for word in re.finditer(r"[▁-█]|[^\s▁-█]+", content):
            text, x = word[0], left + _SVG_CELL * cell_len(content[: word.start()])
            if text in BLOCKS:
                height = 2 * BLOCKS.index(text)
                parts.append(
                    f'<rect {style} x="{x:g}" y="{base + 2 - height:g}" width="{_SVG_CELL - 1:g}" '
                    f'height="{height}"/>'
                )
            else:
                size = f'textLength="{_SVG_CELL * cell_len(text):g}"'
                parts.append(f'<text {style} x="{x:g}" y="{base:g}" {size}>{escape(text)}</text>')
        return "".join(parts)

    console = Console(
        file=io.StringIO(), record=True, width=width, force_terminal=True, color_system="truecolor"
    )
    draw(reports, console)
    svg = console.export_svg(title="bnfreeze", theme=SVG_EXPORT_THEME)
    # rich links a font from the net; to look at a picture must not open a connection.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)
    return re.sub(
        r'<text (class="\S+") x="([\d.]+)" y="([\d.]+)" textLength=[^>]*>([^<]*)</text>',
        placed,
        svg,
    )


def _drawn(sheet: Sheet, width: int, encoding: str) -> Iterator[Text]:
    """A sheet line by line; no line is wider than `width`."""
    from rich.text import Text

    def fit(text: str) -> str:
        return encodable(text, encoding)

    def paragraph(text: str, style: str, indent: int = 0) -> Iterator[Text]:
        for line in wrapped(fit(text), width - indent):
            yield Text(" " * indent + line, style=style)

    if sheet.title:
        yield from paragraph(sheet.title, "bold")
    for note in sheet.notes:
        yield from paragraph(note, "dim")
    if sheet.title and (sheet.rows or sheet.findings):
        yield Text()
    if sheet.findings_first:
        yield from _findings(sheet, paragraph)
    if sheet.rows:
        yield from _table(sheet, width, fit)
        if len(sheet.rows) > MOST_ROWS:
            yield Text(f"... and {len(sheet.rows) - MOST_ROWS:,} rows more", style="dim")
        yield from paragraph(sheet.legend, "dim", 1) if sheet.legend else ()
        yield Text()
    if not sheet.findings_first:
        yield from _findings(sheet, paragraph)
    yield from paragraph(sheet.verdict, "bold")


def _table(sheet: Sheet, width: int, fit: Callable[[str], str]) -> Iterator[Text]:
    from rich.cells import cell_len
    from rich.text import Text

    headings, rows = table_of(sheet, tree=bool(sheet.outlined), wide=width >= _WIDE)
    lines = [headings]
    styles = [["bold"] * len(headings)]
    for row in rows:
        lines.append(["  " * row.depth + row.text, *map(str, row.cells[1:])])
        styles.append(["", *map(_style, row.cells[1:])] if row.cells else ["bold"])
    lines = [list(map(fit, line)) for line in lines]
    columns = list(zip_longest(*lines, fillvalue=""))
    widths = [max(map(cell_len, column)) for column in columns]
    numeric = [all(cell.isdigit() for cell in column[1:] if cell) for column in columns]
    room = width - 1
    # The shortest name column in which no word of a name is broken, and the rest as short as can
    # be. Where they do not fit side by side, each name stands on a line of its own.
    word = max(cell_len(part) for name in columns[0] for part in SEGMENT.findall(name))
    least = min(widths[0], max(word, 12)) + sum(min(w, _PROSE) + _GAP for w in widths[1:])
    stacked = len(widths) > 1 and least > room
    if stacked:
        widths[0] = word = _GAP  # what stands below a name is indented
    gaps = _GAP * (len(widths) - 1)
    _narrow(widths, [word, *(min(w, _PROSE) for w in widths[1:])], room - gaps)
    _narrow(widths, [1] * len(widths), room - gaps)

    for number, (line, style) in enumerate(zip(lines, styles, strict=True)):
        heading = number > 0 and not rows[number - 1].cells
        if stacked or heading:
            yield from (Text.assemble(" ", (part, style[0])) for part in wrapped(line[0], room))
            line[0] = ""
        if not heading:
            for parts in zip_longest(*map(wrapped, line, widths), fillvalue=""):
                text = Text(" ")
                for i, part in enumerate(parts):
                    pad = " " * (widths[i] - cell_len(part))
                    text.append(" " * (_GAP if i else 0) + (pad if numeric[i] else ""))
                    text.append(part, style=style[i])
                    text.append("" if numeric[i] else pad)
                text.rstrip()
                yield text
        if number == 0:
            yield Text(" " + fit("─") * (sum(widths) + gaps))


def _style(cell: Cell) -> str:
    return "cyan" if isinstance(cell, Histogram) else _STYLES.get(tone(cell), "")


def _narrow(widths: list[int], floor: Sequence[int], room: int) -> None:
    """Take from the widest columns, as far as their floors let, until all fit in `room`."""
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > floor[i], widths[i]))
        if widths[widest] <= floor[widest]:
            return
        widths[widest] -= 1


def _findings(sheet: Sheet, paragraph: Callable[..., Iterator[Text]]) -> Iterator[Text]:
    """A paragraph for each kind: the level, what was seen in which layers, and how to mend it."""
    from rich.text import Text

    for first, message, places in finding_groups(sheet.findings):
        level, code = len(first.level), len(first.code)
        where = [name for name, _ in places]
        if len(where) > 3:
            where = [f"{len(where)} {sheet.places}: {where[0]}", where[1], f"… {where[-1]}"]
        heading = f"{first.level} {first.code}  {', '.join(where)}"
        for number, line in enumerate(paragraph(heading, "")):
            if number == 0:
                line.stylize(_STYLES[first.level], 0, level)
                line.stylize("bold", level + 1, level + 1 + code)
            yield line
        seen = [message] if message else [f"{name}: {own}" for name, own in places[:_MOST_NUMBERS]]
        if not message and len(places) > _MOST_NUMBERS:
            seen.append(f"... and {len(places) - _MOST_NUMBERS:,} more")
        for text in seen:
            yield from paragraph(text, "", 2)
        yield from paragraph(f"→ {first.remedy}", "dim", 2)
        yield Text()
