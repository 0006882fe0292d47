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

from bnfreeze.findings import Finding

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["Printable", "Sheet", "escaped"]

# A colour says what it means for a person who wants the layer frozen.
_STYLES = {
    "held": "green",
    "still": "green",
    "running": "green",
    "update": "yellow",
    "train": "yellow",
    "batch": "yellow",
    "error": "bold red",
    "warning": "yellow",
    "note": "cyan",
}


@dataclass(frozen=True)
class Sheet:
    """A table, the findings under it and one line that sums up."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    findings: Sequence[Finding]
    verdict: str


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

    def __rich__(self) -> RenderableType:
        return _draw(self.sheet())

    def save_svg(self, path: str | Path, *, width: int = 100) -> None:
        """Save the picture as an SVG file, `width` characters wide."""
        _recorded(self, width).save_svg(str(path), title="bnfreeze")


def _recorded(what: Printable, width: int) -> Console:
    from rich.console import Console

    console = Console(
        file=io.StringIO(), record=True, width=width, force_terminal=True, color_system="truecolor"
    )
    console.print(what)
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


def _draw(sheet: Sheet) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if sheet.rows:
        parts.append(_table(sheet))
    parts += _findings(sheet.findings)
    parts.append(Text(escaped(sheet.verdict), style="bold"))
    return Group(*parts)


def _table(sheet: Sheet) -> Table:
    from rich import box
    from rich.table import Table

    # A column in which no row says anything is left out.
    used = [i for i in range(len(sheet.columns)) if any(row[i] for row in sheet.rows)]
    table = Table(
        title=escaped(sheet.title),
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for i in used:
        numeric = all(row[i].isdigit() for row in sheet.rows if row[i])
        # The first column, the name, folds rather than loses its end; short words stay whole.
        wide = i == 0 or max(len(row[i]) for row in sheet.rows) > 24
        table.add_column(
            sheet.columns[i],
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=not wide,
        )
    for row in sheet.rows:
        table.add_row(*(_cell(row[i]) for i in used))
    return table


def _cell(value: str) -> Text:
    from rich.text import Text

    return Text(escaped(value), style=_STYLES.get(value, ""))


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
