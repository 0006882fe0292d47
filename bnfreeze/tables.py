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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bnfreeze.files import write_whole
from bnfreeze.findings import Finding
from bnfreeze.text import SEGMENT, encodable, escaped, stdout_encoding, wrapped

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

__all__ = ["Printable", "Sheet", "encodable", "escaped", "html_of", "shared_kind", "svg_of"]

# A colour says what a word means for a person who wants the layer frozen.
_STYLES: Final = {
    "frozen": "bold green",
    "still": "green",
    "running": "green",
    "update": "yellow",
    "train": "yellow",
    "batch": "yellow",
    "unknown": "yellow",
    "error": "bold red",
    "warning": "yellow",
    "note": "cyan",
    "identical": "green",
    "moved": "yellow",
    "differ": "bold red",
    "missing": "bold red",
    "unread": "bold red",
}

# Nobody reads a longer table.
_MOST_ROWS: Final = 2_000
# Of findings that differ in their numbers alone, so many are shown with their own.
_MOST_NUMBERS: Final = 8
# From this width on, a sheet's further columns are shown.
_WIDE: Final = 120
# Cells of this length and more are sentences, which may wrap.
_PROSE: Final = 17
_GAP: Final = 2
_LONGEST_REPR: Final = 300


@dataclass(frozen=True)
class Sheet:
    """A table, the findings under it and one line that sums up.

    Attributes:
        title: what the table shows.
        columns: the headings; the first column names the layer.
        rows: a cell for each column.
        findings: shown under the table, those of one kind together.
        verdict: the last line.
        further: the columns that only a wide terminal shows.
        notes: lines under the title.
        findings_first: whether the findings stand before the table.
        pictures: the columns that hold little pictures.
        legend: what the columns mean; a line under the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    findings: Sequence[Finding]
    verdict: str
    further: frozenset[str] = frozenset()
    notes: Sequence[str] = ()
    findings_first: bool = False
    pictures: frozenset[str] = frozenset()
    legend: str = ""


def shared_kind(title: str, kinds: Sequence[str]) -> tuple[str, frozenset[str]]:
    """Put the kind of layer in the title if all have one, and its column on wide terminals only."""
    if len(set(kinds)) == 1:
        return f"{title} · {len(kinds)} × {kinds[0]}", frozenset({"kind"})
    return title, frozenset()


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
        return _recorded([self], _WIDE).export_html(
            inline_styles=True,
            code_format='<pre style="font-family:monospace;line-height:1.2">{code}</pre>',
        )

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        return _drawn(self.sheet(), options.max_width, options.encoding)

    def save_svg(self, path: str | Path, *, width: int = 100) -> None:
        """Save the picture as an SVG file, `width` characters wide."""
        write_whole(path, svg_of([self], width=width))


def svg_of(sheets: Sequence[Printable], *, width: int) -> str:
    """The picture of several, one under the other, as SVG."""
    from rich.terminal_theme import SVG_EXPORT_THEME

    svg = _recorded(sheets, width).export_svg(title="bnfreeze", theme=SVG_EXPORT_THEME)
    # rich links a font from the net; to look at a picture must not open a connection.
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)


def html_of(sheets: Sequence[Printable], *, width: int) -> str:
    """The picture of several, one under the other, as a page of HTML without scripts."""
    return _recorded(sheets, width).export_html()


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
        if len(sheet.rows) > _MOST_ROWS:
            yield Text(f"... and {len(sheet.rows) - _MOST_ROWS:,} rows more", style="dim")
        yield from paragraph(sheet.legend, "dim", 1) if sheet.legend else ()
        yield Text()
    if not sheet.findings_first:
        yield from _findings(sheet.findings, paragraph)
    yield from paragraph(sheet.verdict, "bold")


def _table(sheet: Sheet, width: int, fit: Callable[[str], str]) -> Iterator[Text]:
    from rich.cells import cell_len

    rows = [[*map(fit, row)] for row in sheet.rows[:_MOST_ROWS]]
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
        heading = number > 0 and len(line) > 1 and not any(line[1:])
        styles = [
            "bold"
            if number == 0 or heading
            else "cyan"
            if name in sheet.pictures
            # "12 of 40 moved" has the colour of its last word.
            else _STYLES.get(cell.rpartition(" ")[2], "")
            for name, cell in zip(columns, line, strict=True)
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

    several = len({one.key for one in findings if one.name}) > 1

    def place(one: Finding) -> str:
        name = one.name or "(the model)"
        return f"{one.key or '(top)'}: {name}" if several and one.name else name

    groups: dict[tuple[str, ...], list[Finding]] = {}
    for one in findings:
        # Layers whose messages differ only in their numbers are shown together.
        message = re.sub(r"[\d.]+", "#", one.message)
        groups.setdefault((one.level, one.code, message, one.remedy), []).append(one)
    for (level, code, _, remedy), group in groups.items():
        for number, line in enumerate(
            paragraph(f"{level} {code}  {_where([place(one) for one in group])}", "")
        ):
            if number == 0:
                line.stylize(_STYLES[level], 0, len(level))
                line.stylize("bold", len(level) + 1, len(level) + 1 + len(code))
            yield line
        if len({one.message for one in group}) == 1:
            yield from paragraph(group[0].message, "", 2)
        else:
            for one in group[:_MOST_NUMBERS]:
                yield from paragraph(f"{place(one)}: {one.message}", "", 2)
            if len(group) > _MOST_NUMBERS:
                yield from paragraph(f"... and {len(group) - _MOST_NUMBERS:,} more", "", 2)
        yield from paragraph(f"→ {remedy}", "dim", 2)
        yield Text()


def _where(named: Sequence[str]) -> str:
    if len(named) <= 3:
        return ", ".join(named)
    return f"{len(named)} layers: {named[0]}, {named[1]}, … {named[-1]}"
