"""Zip archives, checked whole before anything of them is used.

torch and NumPy write one shape of zip file: entries one after the other, the directory last, no
comment, nothing left over. Only that shape is read, so that no two readers can see two different
files in the same bytes. What is read of it must be stored as it is; other entries may be
compressed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from bnfreeze.checkpoints.limits import MAX_NAME_LENGTH, MAX_RECORDS, check_limit
from bnfreeze.checkpoints.source import Source
from bnfreeze.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    damaged,
)

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ2H2L4Q")

_ENCRYPTED: Final = 0x1 | 0x40 | 0x2000
_SIZES_FOLLOW: Final = 0x8
_IS_FOLDER: Final = 0x10


@dataclass(eq=False)
class Entry:
    """A file in the archive, as the directory has it.

    Attributes:
        name: its name.
        size: of its bytes.
        checksum: the CRC-32 of its bytes; None where it was left out.
        refusal: why it must not be read; None where it may.
        at: where its local header begins.
        packed: how many bytes it takes behind that.
        end: where the next entry begins.
    """

    name: str
    size: int
    checksum: int | None
    refusal: CheckpointError | None
    at: int
    packed: int
    _archive: Source
    end: int = 0

    @cached_property
    def source(self) -> Source:
        """Its bytes. What stands before them in the file is checked when they are first read.

        Raises:
            CheckpointError: it must not be read.
        """
        if self.refusal is not None:
            raise self.refusal
        return self._archive.later(self._begin, self.size, self.checksum)

    def _begin(self) -> int:
        """Where its bytes begin, by its local header.

        Raises:
            CorruptCheckpointError: that is not there, or says something else.
        """
        local = _LOCAL.unpack(self._archive.read(self.at, _LOCAL.size))
        begin: int = self.at + _LOCAL.size + local[9] + local[10]
        if (
            local[0] != b"PK\3\4"
            or local[2] & _ENCRYPTED
            or local[3]
            or self._archive.read(self.at + _LOCAL.size, local[9]) != self.name.encode()
        ):
            raise damaged(f"{self.name!r} is not where the zip file's directory says.")
        sizes = zip((local[7], local[8]), (self.packed, self.size), strict=True)
        if not local[2] & _SIZES_FOLLOW and any(
            here not in (there, 0xFFFFFFFF) for here, there in sizes
        ):
            raise damaged(f"{self.name!r} has one size here and another there.")
        if begin + self.packed > self.end:
            raise damaged("entries of the zip file overlap.")
        return begin


def read_directory(source: Source) -> dict[str, Entry]:
    """The entries of a zip file, by name.

    Raises:
        UnsafeCheckpointError: more than the limits allow.
        CorruptCheckpointError: truncated, ambiguous, or contradicting itself.
    """
    count, start, end = _directory(source)
    check_limit(count, MAX_RECORDS, "entries of a zip file")
    check_limit(end - start, MAX_RECORDS * 200, "bytes of a zip file's directory")
    directory = source.read(start, end - start)
    entries: dict[str, Entry] = {}
    folded: set[str] = set()
    position = 0
    for _ in range(count):
        entry, position = _entry(source, directory, position)
        # torch's reader finds names whatever their case.
        if entry.name.casefold() in folded:
            raise CorruptCheckpointError(
                f"Ambiguous: the zip file has {entry.name!r} more than once."
            )
        folded.add(entry.name.casefold())
        entries[entry.name] = entry
    if position != len(directory):
        raise damaged("the zip file's directory does not have its own length.")
    end = start
    for entry in sorted(entries.values(), key=lambda entry: entry.at, reverse=True):
        if entry.at + _LOCAL.size + len(entry.name.encode()) + entry.packed > end:
            raise damaged("entries of the zip file overlap.")
        entry.end, end = end, entry.at
    return entries


def _directory(source: Source) -> tuple[int, int, int]:
    """How many entries the directory has, where it starts and where it ends."""
    truncated = CorruptCheckpointError(
        "Truncated: it begins as a zip file and its end is missing. Download or copy it again."
    )
    at = source.size - _END.size
    if at < 0:
        raise truncated
    (magic, disk, first_disk, here, count, size, start, comment) = _END.unpack(
        source.read(at, _END.size)
    )
    if magic != b"PK\5\6" or comment:
        raise truncated
    contradiction = damaged("the end of the zip file contradicts itself.")
    end = at
    if at >= _LOCATOR.size:
        magic, _, end64, _ = _LOCATOR.unpack(source.read(at - _LOCATOR.size, _LOCATOR.size))
        if magic == b"PK\6\7":
            end = end64
            wide = _END64.unpack(source.read(end64, _END64.size))
            if wide[0] != b"PK\6\6" or end64 + _END64.size != at - _LOCATOR.size:
                raise contradiction
            # Where the narrow fields do hold a number, both must say the same.
            narrow = ((count, 0xFFFF), (size, 0xFFFFFFFF), (start, 0xFFFFFFFF))
            for (short, most), full in zip(narrow, wide[7:], strict=True):
                if short not in (most, full):
                    raise contradiction
            disk, first_disk, here, count, size, start = wide[4:]
    if disk or first_disk or here != count or start + size != end:
        raise contradiction
    return count, start, end


def _entry(source: Source, directory: bytes, position: int) -> tuple[Entry, int]:
    """One entry of the directory, and the position of the next."""
    if position + _CENTRAL.size > len(directory):
        raise damaged("the zip file's directory breaks off.")
    fields = _CENTRAL.unpack_from(directory, position)
    (magic, _, _, flags, method, _, _, checksum, packed, size) = fields[:10]
    lengths, at = fields[10:13], fields[16]
    position += _CENTRAL.size
    after = position + sum(lengths)
    if magic != b"PK\1\2" or after > len(directory):
        raise damaged("the zip file's directory breaks off.")
    raw = directory[position : position + lengths[0]]
    check_limit(len(raw), MAX_NAME_LENGTH, "bytes of a name in a zip file")
    try:
        # Whatever the flag says: torch looks for a name by its bytes.
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise damaged("a name in the zip file is no text.") from None
    if "\0" in name:
        raise CorruptCheckpointError("Ambiguous: a name in the zip file has a NUL in it.")
    extra = directory[position + lengths[0] : position + lengths[0] + lengths[1]]
    wide = _wide_numbers(extra)
    try:
        size, packed, at = [next(wide) if n == 0xFFFFFFFF else n for n in (size, packed, at)]
    except StopIteration:
        raise damaged("a size in the zip file is missing.") from None
    refusal: CheckpointError | None = None
    if fields[15] & _IS_FOLDER or name.endswith("/"):
        # torch's reader gives zeros for what is marked as a folder.
        refusal = CorruptCheckpointError(f"Ambiguous: the zip file has {name!r} as a folder.")
    elif flags & _ENCRYPTED:
        refusal = UnsafeCheckpointError(f"Refused: {name!r} in it is encrypted.")
    elif method or packed != size:
        refusal = UnsafeCheckpointError(
            f"Refused: {name!r} in it is compressed and may grow without bounds. "
            f"If you trust the file, unpack it and zip it again with `zip -0`."
        )
    # torch writes a checksum of 0 when checksums are switched off.
    return Entry(name, size, checksum or None, refusal, at, packed, source), after


def _wide_numbers(extra: bytes) -> Iterator[int]:
    """The numbers in the zip64 field, which stand for those that do not fit into 32 bits."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 1:
            count = len(extra[position : position + length]) // 8
            yield from struct.unpack_from(f"<{count}Q", extra, position)
            return
        position += length
