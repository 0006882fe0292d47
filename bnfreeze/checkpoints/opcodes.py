"""The opcodes of a pickle, one by one, with their arguments.

Long byte strings, which are the arrays in a plain pickle, are left in the file: the argument is
then the part of the file where they lie.
"""

from __future__ import annotations

import codecs
import pickletools
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_PICKLE_BYTES, check_limit
from bnfreeze.checkpoints.source import Source
from bnfreeze.errors import CorruptCheckpointError

__all__ = ["CODES", "Opcodes"]

# By name, the byte that stands for it.
CODES: Final = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}

_WINDOW: Final = 1 << 16
# Byte strings that are longer stay in the file.
_LONG: Final = 1 << 12
# An opcode and the longest argument of fixed size.
_MARGIN: Final = 9


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _old_text(data: bytes) -> str:
    return data.decode("latin-1")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


_FIXED: Final = {
    CODES[name]: struct.Struct(form)
    for name, form in {
        "BININT": "<i",
        "BININT1": "<B",
        "BININT2": "<H",
        "BINFLOAT": ">d",
        "PROTO": "<B",
        "FRAME": "<Q",
        "BINPUT": "<B",
        "LONG_BINPUT": "<I",
        "BINGET": "<B",
        "LONG_BINGET": "<I",
        "EXT1": "<B",
        "EXT2": "<H",
        "EXT4": "<i",
    }.items()
}

# The size that comes first, what to make of the bytes, and whether they may stay in the file.
_COUNTED: Final[dict[int, tuple[struct.Struct, Callable[[bytes], Any], bool]]] = {
    CODES[name]: (struct.Struct(form), decode, name.endswith(("BYTES", "BYTES8", "STRING", "Y8")))
    for form, decode, names in (
        ("<B", _text, ("SHORT_BINUNICODE",)),
        ("<I", _text, ("BINUNICODE",)),
        ("<Q", _text, ("BINUNICODE8",)),
        ("<B", bytes, ("SHORT_BINBYTES",)),
        ("<I", bytes, ("BINBYTES",)),
        ("<Q", bytes, ("BINBYTES8", "BYTEARRAY8")),
        ("<B", _old_text, ("SHORT_BINSTRING",)),
        ("<i", _old_text, ("BINSTRING",)),
        ("<B", _integer, ("LONG1",)),
        ("<i", _integer, ("LONG4",)),
    )
    for name in names
}


def _number(line: bytes) -> int | bool:
    return line == b"01" if line in (b"00", b"01") else int(line)


def _quoted(line: bytes) -> str:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
        raise ValueError("a string without quotes")
    return _old_text(codecs.escape_decode(line[1:-1])[0])


_LINES: Final[dict[int, Callable[[bytes], Any]]] = {
    CODES["INT"]: _number,
    CODES["LONG"]: lambda line: int(line.removesuffix(b"L")),
    CODES["FLOAT"]: float,
    CODES["STRING"]: _quoted,
    CODES["UNICODE"]: lambda line: line.decode("raw-unicode-escape"),
    CODES["PUT"]: int,
    CODES["GET"]: int,
    CODES["PERSID"]: _text,
}
_TWO_LINES: Final = frozenset({CODES["GLOBAL"], CODES["INST"]})
_STOP: Final = CODES["STOP"]


class Opcodes:
    """The opcodes of the pickle at a position of a file; iterating ends after its STOP.

    Attributes:
        position: after the iteration, where the pickle ends.
    """

    def __init__(self, source: Source, start: int) -> None:
        self.position = start
        self._source = source
        self._window = b""
        self._at = 0
        # Bytes that were looked at, without those that stay in the file.
        self._taken = 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """The byte of each opcode, and its argument (None where it has none).

        Raises:
            CorruptCheckpointError: the bytes end, or a line does.
            UnsafeCheckpointError: more bytes than the limit.
            ValueError: an argument that is not what it should be.
        """
        while True:
            if len(self._window) - self._at < _MARGIN:
                self._refill(_WINDOW)
                if self._at >= len(self._window):
                    raise CorruptCheckpointError("Damaged: its pickle ends too early.")
            code = self._window[self._at]
            self._at += 1
            if code in _FIXED:
                form = _FIXED[code]
                argument = form.unpack(self._take(form.size))[0]
            elif code in _COUNTED:
                argument = self._counted(*_COUNTED[code])
            elif code in _LINES:
                argument = _LINES[code](self._line())
            elif code in _TWO_LINES:
                argument = (_text(self._line()), _text(self._line()))
            else:
                argument = None
            if code == _STOP:
                self.position += self._at
                self._window, self._at = b"", 0
                yield code, None
                return
            yield code, argument

    def _refill(self, wanted: int) -> None:
        """Have `wanted` bytes in the window from here, or as many as there are."""
        self._taken += self._at
        check_limit(self._taken, MAX_PICKLE_BYTES, "bytes of a pickle and more")
        self.position += self._at
        left = self._source.size - self.position
        self._window = self._source.read(self.position, max(0, min(wanted, left)))
        self._at = 0

    def _take(self, count: int) -> bytes:
        if len(self._window) - self._at < count:
            check_limit(self._taken + count, MAX_PICKLE_BYTES, "bytes of a pickle and more")
            if count > self._source.size - self.position - self._at:
                raise CorruptCheckpointError("Damaged: its pickle ends or breaks off.")
            self._refill(max(count, _WINDOW))
        data = self._window[self._at : self._at + count]
        self._at += count
        return data

    def _counted(
        self, form: struct.Struct, decode: Callable[[bytes], Any], may_stay: bool
    ) -> object:
        (count,) = form.unpack(self._take(form.size))
        if count < 0:
            raise CorruptCheckpointError("Damaged: its pickle has a text of negative length.")
        if not may_stay or count <= _LONG:
            return decode(self._take(count))
        there = self.position + self._at
        if count > self._source.size - there:
            raise CorruptCheckpointError("Damaged: its pickle ends or breaks off.")
        self._taken += self._at
        self._window, self._at = b"", 0
        self.position = there + count
        return self._source.part(there, count)

    def _line(self) -> bytes:
        wanted = _WINDOW
        while (end := self._window.find(b"\n", self._at)) < 0:
            if self.position + len(self._window) >= self._source.size:
                raise CorruptCheckpointError("Damaged: its pickle ends or breaks off.")
            check_limit(self._taken + wanted, MAX_PICKLE_BYTES, "bytes of a pickle and more")
            self._refill(wanted)
            wanted *= 2
        line = self._window[self._at : end]
        self._at = end + 1
        return line
