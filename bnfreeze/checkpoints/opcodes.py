"""The opcodes of a pickle, one by one, with their arguments.

Long byte strings, which are the arrays in a plain pickle, are left in the file: the argument is
then the part of the file where they lie.
"""

from __future__ import annotations

import codecs
import pickletools
import struct
from collections.abc import Callable, Iterator
from pickle import decode_long
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_PICKLE_BYTES, check_limit
from bnfreeze.checkpoints.source import Source
from bnfreeze.errors import damaged

# By name, the byte that stands for it.
CODES: Final = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}

_WINDOW: Final = 1 << 16
# Byte strings that are longer stay in the file.
_LONG: Final = 1 << 12


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _old_text(data: bytes) -> str:
    return data.decode("latin-1")


# The size that comes first, what to make of the bytes, and whether they may stay in the file.
_COUNTED: Final[dict[int, tuple[struct.Struct, Callable[[bytes], Any], bool]]] = {
    CODES[name]: (struct.Struct(form), decode, decode in (bytes, _old_text))
    for decode, forms in (
        (_text, {"SHORT_BINUNICODE": "<B", "BINUNICODE": "<I", "BINUNICODE8": "<Q"}),
        (bytes, {"SHORT_BINBYTES": "<B", "BINBYTES": "<I", "BINBYTES8": "<Q", "BYTEARRAY8": "<Q"}),
        (_old_text, {"SHORT_BINSTRING": "<B", "BINSTRING": "<i"}),
        (decode_long, {"LONG1": "<B", "LONG4": "<i"}),
    )
    for name, form in forms.items()
}


def _quoted(opcodes: Opcodes) -> str:
    line = opcodes.readline()[:-1]
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
        raise ValueError("a string without quotes")
    return _old_text(codecs.escape_decode(line[1:-1])[0])


def _two_lines(opcodes: Opcodes) -> tuple[str, str]:
    return _text(opcodes.readline()[:-1]), _text(opcodes.readline()[:-1])


# What reads the argument of the others: Python's own readers, but for names, which may have spaces
# in them, and for strings of Python 2, which may have any bytes.
_READERS: Final[dict[int, Callable[[Any], Any]]] = {
    **{ord(opcode.code): opcode.arg.reader for opcode in pickletools.opcodes if opcode.arg},
    CODES["STRING"]: _quoted,
    CODES["GLOBAL"]: _two_lines,
    CODES["INST"]: _two_lines,
}
_STOP: Final = CODES["STOP"]


class Opcodes:
    """The opcodes of the pickle at a position of a file; iterating ends after its STOP."""

    def __init__(self, source: Source, start: int) -> None:
        self._source = source
        # A part of the file, where it begins, and how far it was read.
        self._window = b""
        self._begin = start
        self._at = 0
        # Bytes that were looked at before it, without those that stay in the file.
        self._taken = 0

    @property
    def position(self) -> int:
        """How far the file was read; after the iteration, where the pickle ends."""
        return self._begin + self._at

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """The byte of each opcode, and its argument (None where it has none).

        Raises:
            CorruptCheckpointError: the bytes end, or a line does.
            UnsafeCheckpointError: more bytes than the limit.
            ValueError: an argument that is not what it should be.
        """
        code = -1
        while code != _STOP:
            if self._at == len(self._window):
                self._refill(1)
            code = self._window[self._at]
            self._at += 1
            if code in _COUNTED:
                yield code, self._counted(*_COUNTED[code])
            else:
                reader = _READERS.get(code)
                yield code, reader(self) if reader else None

    def read(self, count: int) -> bytes:
        """The next bytes."""
        if len(self._window) - self._at < count:
            self._refill(count)
        data = self._window[self._at : self._at + count]
        self._at += count
        return data

    def readline(self) -> bytes:
        """The bytes to the end of the line, and that end."""
        while (end := self._window.find(b"\n", self._at)) < 0:
            have = len(self._window) - self._at
            more = self._source.size - self.position - have
            self._refill(have + max(1, min(have, more)))
        return self.read(end + 1 - self._at)

    def _refill(self, count: int) -> None:
        """Have so many bytes in the window from here, and more where there are more."""
        self._taken += self._at
        self._begin += self._at
        self._at = 0
        left = self._source.size - self._begin
        check_limit(self._taken + count, MAX_PICKLE_BYTES, "bytes of a pickle and more")
        if count > left:
            raise damaged("its pickle ends or breaks off.")
        self._window = self._source.read(self._begin, min(max(count, _WINDOW), left))

    def _counted(
        self, form: struct.Struct, decode: Callable[[bytes], Any], may_stay: bool
    ) -> object:
        (count,) = form.unpack(self.read(form.size))
        if count < 0:
            raise damaged("its pickle has a text of negative length.")
        if not may_stay or count <= _LONG:
            return decode(self.read(count))
        there = self._source.part(self.position, count)
        self._taken += self._at
        self._begin = self.position + count
        self._window, self._at = b"", 0
        return there
