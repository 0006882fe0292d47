"""Facts laid out as a sheet, and a sheet drawn: for a terminal, as text, SVG or HTML.

What knows the facts says how they lie on a sheet (`Printable.sheet`); how a sheet looks is known
here alone. Nothing of a sheet is ever read as markup, and control characters are shown escaped.
"""

from __future__ import annotations

import io
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnfreeze.files import write_whole
from bnfreeze.findings import Finding

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["Printable", "Sheet", "escaped", "html_of", "svg_of", "told_kinds"]

# A colour says what it means for a person who wants the layer frozen.
_STYLES = {
    "held": "bold green",
    "frozen": "bold green",
    "still": "green",
    "running": "green",
    "update": "yellow",
    "train": "yellow",
    "batch": "yellow",
    "error": "bold red",
    "warning": "yellow",
    "note": "cyan",
    "identical": "green",
    "moved": "yellow",
    "differ": "bold red",
    "missing": "bold red",
    "unread": "bold red",
}


# Nobody reads a longer table, and drawing one takes minutes.
_MOST_ROWS = 2_000
# From this width on, a sheet's further columns are shown.
_WIDE = 120
# Cells of this length and more are sentences, which may wrap.
_PROSE = 17


@dataclass(frozen=True)
class Sheet:
    """A table, the findings under it and one line that sums up.

    Attributes:
        title: what the table shows.
        columns: the headings; the first column names the layer.
        rows: a cell for each column.
        findings: told under the table, those of one kind together.
        verdict: the last line.
        further: the columns that only a wide terminal shows.
        notes: lines under the title.
        findings_first: whether the findings stand before the table.
        pictures: the columns that hold little pictures.
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


def told_kinds(title: str, kinds: Sequence[str]) -> tuple[str, frozenset[str]]:
    """Tell a single kind of layer in the title, and leave its column to a wide terminal."""
    if len(set(kinds)) == 1:
        return f"{title} · {len(kinds)} × {kinds[0]}", frozenset({"kind"})
    return title, frozenset()


class Printable(ABC):
    """Facts that give a table when printed."""

    @abstractmethod
    def sheet(self) -> Sheet:
        """The facts as a sheet."""

    def __str__(self) -> str:
        from rich.console import Console

        # As wide as the terminal, or as COLUMNS says; 80 where neither is known.
        console = Console(file=io.StringIO(), color_system=None, width=Console().width)
        console.print(self)
        return str(console.file.getvalue()).rstrip("\n")  # type: ignore[attr-defined]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.text import Text

        sheet = self.sheet()
        if sheet.findings_first:
            yield Text(escaped(sheet.title), style="bold")
        for note in sheet.notes:
            yield Text(escaped(note), style="dim")
        if sheet.findings_first and sheet.findings:
            yield Text()
            yield from _findings(sheet.findings)
        if sheet.rows:
            yield _table(sheet, options.max_width)
        if len(sheet.rows) > _MOST_ROWS:
            yield Text(f"… and {len(sheet.rows) - _MOST_ROWS:,} rows more", style="dim")
        if not sheet.findings_first:
            yield from _findings(sheet.findings)
        yield Text(escaped(sheet.verdict), style="bold")

    def save_svg(self, path: str | Path, *, width: int = 100) -> None:
        """Save the picture as an SVG file, `width` characters wide."""
        write_whole(path, svg_of([self], width=width))


def svg_of(sheets: Sequence[Printable], *, width: int) -> str:
    """The picture of several, one under the other, as SVG."""
    from rich.terminal_theme import SVG_EXPORT_THEME

    svg = _recorded(sheets, width).export_svg(title="bnfreeze", theme=SVG_EXPORT_THEME)
    # rich links a font from the net; a picture must not call home when it is looked at.
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


def escaped(text: str) -> str:
    r"""Show control and bidirectional characters by their code, as ``\x1b``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() and unicodedata.category(char) not in {"Cf", "Co", "Cn"}
        else char.encode("unicode_escape").decode()
        for char in text
    )


def _table(sheet: Sheet, width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = sheet.rows[:_MOST_ROWS]
    cells = [[row[i] for row in rows] for i in range(len(sheet.columns))]
    shown = [
        i
        for i, name in enumerate(sheet.columns)
        # A column that says nothing in any row is left out.
        if any(cells[i]) and (width >= _WIDE or name not in sheet.further)
    ]
    longest = {i: max(map(len, [sheet.columns[i], *cells[i]])) for i in shown}
    table = Table(
        title=None if sheet.findings_first else escaped(sheet.title),
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    # Short words stay whole; the name takes what they leave, and folds rather than loses its end.
    # Where there is no room for that, everything folds: a figure cut short is another figure.
    room = width - 2 * len(shown) - 2 - sum(min(longest[i], _PROSE) for i in shown[1:])
    tight = room < min(12, longest[0])
    for i in shown:
        numeric = all(cell.isdigit() for cell in cells[i] if cell)
        table.add_column(
            sheet.columns[i],
            justify="right" if numeric else "left",
            overflow="fold",
            width=min(room, longest[i]) if i == 0 and not tight else None,
            no_wrap=i > 0 and longest[i] < _PROSE and not tight,
        )
    for row in rows:
        heading = len(row) > 1 and not any(row[1:])
        table.add_row(
            *(
                Text(
                    escaped(row[i]), style="cyan" if sheet.columns[i] in sheet.pictures else "bold"
                )
                if heading or sheet.columns[i] in sheet.pictures
                else _cell(row[i])
                for i in shown
            )
        )
    return table


def _cell(value: str) -> Text:
    from rich.text import Text

    # "12 of 40 moved" has the colour of its last word.
    return Text(escaped(value), style=_STYLES.get(value.rpartition(" ")[2], ""))


def _findings(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """One paragraph for each kind: how grave, what, how to mend it, and in which layers."""
    from rich.padding import Padding
    from rich.text import Text

    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        # Layers that differ in their figures alone are told together.
        message = re.sub(r"[\d.]+", "#", finding.message)
        groups.setdefault((finding.level, finding.code, message, finding.remedy), []).append(
            finding
        )
    for group in groups.values():
        finding = group[0]
        head = Text.assemble(
            (finding.level, _STYLES[finding.level]), " ", (finding.code, "bold"), "  "
        )
        head.append(escaped(_where([member.layer for member in group])))
        yield head
        yield Padding(Text(escaped(finding.message)), (0, 0, 0, 2))
        yield Padding(Text(escaped(f"→ {finding.remedy}"), style="dim"), (0, 0, 1, 2))


def _where(layers: Sequence[str]) -> str:
    named = [layer or "(the model)" for layer in layers]
    if len(named) <= 3:
        return ", ".join(named)
    return f"{len(named)} layers: {named[0]}, {named[1]}, … {named[-1]}"
