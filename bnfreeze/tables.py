"""Draws facts: a table and the findings, for a terminal, or as text, SVG or HTML.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bnfreeze.files import write_whole
from bnfreeze.findings import Finding
from bnfreeze.sheets import MOST_ROWS, Sheet, finding_groups, shared_kind, tone, tree_rows
from bnfreeze.text import SEGMENT, encodable, stdout_encoding, wrapped
from bnfreeze.tree import BLOCKS, Histogram

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

__all__ = ["Printable", "Sheet", "html_of", "shared_kind", "svg_of"]

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


class _Buffer(io.StringIO):
    """Text in memory that says of which encoding it will be."""

    encoding = "utf-8"


class Printable(ABC):
    """Facts that give a table when printed, and HTML in a notebook.

    ``str()`` uses only characters that ``sys.stdout`` can show.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A dataclass keeps a __repr__ that its class has, and overrides an inherited one.
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Printable.__repr__  # type: ignore[method-assign]

    @abstractmethod
    def sheet(self) -> Sheet:
        """The facts as a sheet."""

    def __str__(self) -> str:
        from rich.console import Console

        buffer = _Buffer()
        buffer.encoding = stdout_encoding()
        # As wide as the terminal, or as COLUMNS says; 80 where neither is known.
        Console(file=buffer, color_system=None, width=Console().width).print(self)
        return buffer.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        verdict = encodable(self.sheet().verdict)
        if len(verdict) > _LONGEST_REPR:
            verdict = f"{verdict[:_LONGEST_REPR]}..."
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
        write_whole(path, html_of([self]))

    def save_svg(self, path: str | Path, *, width: int = 100) -> None:
        """Save the picture as an SVG file, `width` characters wide."""
        write_whole(path, svg_of([self], width=width))


def svg_of(sheets: Sequence[Printable], *, width: int = _WIDE) -> str:
    """The picture of several, one under the other, as SVG.

    Each word has its own place and a bar is a rectangle: programs that draw SVG differ in fonts and
    in what they do with spaces.
    """
    from rich.cells import cell_len
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

    svg = _recorded(sheets, width).export_svg(title="bnfreeze", theme=SVG_EXPORT_THEME)
    # rich links a font from the net; to look at a picture must not open a connection.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)
    return re.sub(
        r'<text (class="\S+") x="([\d.]+)" y="([\d.]+)" textLength=[^>]*>([^<]*)</text>',
        placed,
        svg,
    )


def html_of(sheets: Sequence[Printable]) -> str:
    """A page of HTML with several, one under the other."""
    from bnfreeze.html import page

    return page([one.sheet() for one in sheets])


def _recorded(sheets: Sequence[Printable], width: int) -> Console:
    from rich.console import Console

    console = Console(
        file=io.StringIO(), record=True, width=width, force_terminal=True, color_system="truecolor"
    )
    for number, sheet in enumerate(sheets):
        if number:
            console.print()
        console.print(sheet)
    return console


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
    if sheet.findings_first and sheet.findings:
        yield Text()
        yield from _findings(sheet.findings, paragraph)
    if sheet.rows:
        if not (sheet.findings_first and sheet.findings):
            yield Text()
        yield from _table(sheet, width, fit)
        if len(sheet.rows) > MOST_ROWS:
            yield Text(f"... and {len(sheet.rows) - MOST_ROWS:,} rows more", style="dim")
        yield from paragraph(sheet.legend, "dim", 1) if sheet.legend else ()
        yield Text()
    if not sheet.findings_first:
        yield from _findings(sheet.findings, paragraph)
    yield from paragraph(sheet.verdict, "bold")


def _table(sheet: Sheet, width: int, fit: Callable[[str], str]) -> Iterator[Text]:
    from rich.cells import cell_len

    tree = list(tree_rows(sheet, flat=not sheet.outlined))
    pictures = {i for row in tree for i, x in enumerate(row.cells, 1) if isinstance(x, Histogram)}
    # A heading has no other cells.
    rows = [
        [fit("  " * row.depth + row.text), *(fit(str(cell)) for cell in row.cells or blank)]
        for blank in [[""] * (len(sheet.columns) - 1)]
        for row in tree
    ]
    shown = [
        i
        for i, name in enumerate(sheet.columns)
        # A column that says nothing in any row is left out.
        if any(row[i] for row in rows) and (width >= _WIDE or name not in sheet.further)
    ]
    columns = [sheet.columns[i] for i in shown]
    cells = [[fit(name) for name in columns], *([row[i] for i in shown] for row in rows)]
    widths = [max(cell_len(line[i]) for line in cells) for i in range(len(shown))]
    numeric = [all(line[i].isdigit() for line in cells[1:] if line[i]) for i in range(len(shown))]
    room = width - 1
    # The shortest name column in which no word of a name is broken, and the rest as short as can
    # be. Where they do not fit side by side, each name stands on a line of its own.
    word = max(cell_len(part) for line in cells for part in SEGMENT.findall(line[0]) or [""])
    least = min(widths[0], max(word, 12)) + sum(min(w, _PROSE) + _GAP for w in widths[1:])
    stacked = len(shown) > 1 and least > room
    if stacked:
        widths[0] = _GAP  # what stands below a name is indented
    floor = [word if not stacked else _GAP, *(min(w, _PROSE) for w in widths[1:])]
    _narrow(widths, floor, room - _GAP * (len(widths) - 1))
    _narrow(widths, [1] * len(widths), room - _GAP * (len(widths) - 1))

    for number, line in enumerate(cells):
        heading = number > 0 and tree[number - 1].heading
        styles = [
            "bold"
            if number == 0 or heading
            else "cyan"
            if i in pictures
            else _STYLES.get(tone(cell), "")
            for i, cell in zip(shown, line, strict=True)
        ]
        if stacked or heading:
            for part in wrapped(line[0], room):
                yield _line([part], styles, [0], [False])
            line = ["", *line[1:]]
        if not heading:
            parts = [wrapped(cell, w) for cell, w in zip(line, widths, strict=True)]
            for i in range(max(map(len, parts))):
                one = [part[i] if i < len(part) else "" for part in parts]
                yield _line(one, styles, widths, numeric)
        if number == 0:
            rule = fit("─") * (sum(widths) + _GAP * (len(widths) - 1))
            yield _line([rule], [""], [0], [False])


def _narrow(widths: list[int], floor: Sequence[int], room: int) -> None:
    """Take from the widest columns, as far as their floors let, until all fit in `room`."""
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > floor[i], widths[i]))
        if widths[widest] <= floor[widest]:
            return
        widths[widest] -= 1


def _line(
    cells: Sequence[str], styles: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]
) -> Text:
    from rich.cells import cell_len
    from rich.text import Text

    text = Text(" ")
    for i, (cell, style, width, right) in enumerate(
        zip(cells, styles, widths, numeric, strict=False)
    ):
        pad = " " * (width - cell_len(cell))
        text.append(" " * (_GAP if i else 0) + (pad if right else ""))
        text.append(cell, style=style)
        text.append("" if right else pad)
    text.rstrip()
    return text


def _findings(
    findings: Sequence[Finding], paragraph: Callable[..., Iterator[Text]]
) -> Iterator[Text]:
    """A paragraph for each kind: the level, what was seen in which layers, and how to mend it."""
    from rich.text import Text

    for group in finding_groups(findings):
        level, code = len(group.level), len(group.code)
        where = _where([name for name, _ in group.places])
        for number, line in enumerate(paragraph(f"{group.level} {group.code}  {where}", "")):
            if number == 0:
                line.stylize(_STYLES[group.level], 0, level)
                line.stylize("bold", level + 1, level + 1 + code)
            yield line
        if group.message:
            yield from paragraph(group.message, "", 2)
        else:
            for name, message in group.places[:_MOST_NUMBERS]:
                yield from paragraph(f"{name}: {message}", "", 2)
            if len(group.places) > _MOST_NUMBERS:
                yield from paragraph(f"... and {len(group.places) - _MOST_NUMBERS:,} more", "", 2)
        yield from paragraph(f"→ {group.remedy}", "dim", 2)
        yield Text()


def _where(named: Sequence[str]) -> str:
    if len(named) <= 3:
        return ", ".join(named)
    return f"{len(named)} layers: {named[0]}, {named[1]}, … {named[-1]}"
