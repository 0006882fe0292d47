"""Text made fit for where it is shown: its encoding, its width, and no control characters."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Sequence
from typing import Final

# What stands for a character that the output's encoding does not have.
_INSTEAD: Final = {"…": "..", "→": "->", "·": "-", "×": "x", "–": "-", "−": "-", "─": "-"}
# All bars or none: code page 437 has two of the eight.
_ASCII_BARS: Final = str.maketrans("▁▂▃▄▅▆▇█", ".:-=+*#@")
# Where a word too long for its line may be broken: at dots, else inside the segments.
SEGMENT: Final = re.compile(r"[^.]*\.|[^.]+")
_PART: Final = re.compile(r"[^_/-]*[_/-]+|[^_/-]+")
_CAMEL: Final = re.compile(r".+?(?:(?<=[a-z0-9])(?=[A-Z])|$)")


def escaped(text: str) -> str:
    r"""Show control and bidirectional characters by their code, as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(text: str, encoding: str | None = None) -> str:
    r"""Give text that can be printed: control characters escaped, and all in an encoding.

    Args:
        text: any text, of one line.
        encoding: where it will be printed; None for that of ``sys.stdout``. A character that it
            does not have is replaced by a similar one of ASCII, or by its code, as ``\u6c34``.
    """
    text = escaped(text)
    encoding = encoding or stdout_encoding()
    if text.isascii() or encoding.lower().startswith("utf"):
        return text
    try:
        codecs.lookup(encoding)
    except LookupError:
        encoding = "ascii"
    return text.translate(_ASCII_BARS).encode(encoding, "bnfreeze.similar").decode(encoding)


def _similar(error: UnicodeError) -> tuple[str, int]:
    """What is written for characters that an encoding does not have (`codecs.register_error`)."""
    assert isinstance(error, UnicodeEncodeError)
    chars = error.object[error.start : error.end]
    codes = (_INSTEAD.get(c) or c.encode("ascii", "backslashreplace").decode() for c in chars)
    return "".join(codes), error.end


codecs.register_error("bnfreeze.similar", _similar)


def stdout_encoding() -> str:
    """The encoding of ``sys.stdout``; UTF-8 where there is none."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def counted(number: int, what: str) -> str:
    """``"1 layer"`` or ``"2 layers"``."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def listed(names: Sequence[str], most: int) -> str:
    """The names in a line; of more than `most` the first, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def wrapped(text: str, width: int) -> list[str]:
    """Break text into lines: at spaces; in a word too long for a line, at dots and the like."""
    from rich.cells import cell_len, chop_cells

    width = max(width, 1)
    if cell_len(text) <= width:
        return [text]
    indent = " " * min(len(text) - len(text.lstrip()), width // 2)
    lines = [indent]
    for word in text.split():
        pieces = [word]
        for split in (
            SEGMENT.findall,
            _PART.findall,
            _CAMEL.findall,
            lambda piece: chop_cells(piece, width),
        ):
            pieces = [
                part
                for piece in pieces
                for part in (split(piece) if cell_len(indent + piece) > width else [piece])
            ]
        for position, piece in enumerate(pieces):
            between = " " if position == 0 and lines[-1] != indent else ""
            if cell_len(lines[-1] + between + piece) <= width:
                lines[-1] += between + piece
            elif lines[-1] == indent:
                lines[-1] = piece
            else:
                lines.append(indent + piece if cell_len(indent + piece) <= width else piece)
    return lines
