"""How much a checkpoint may claim before it is refused: far above real ones, far below harm."""

from __future__ import annotations

from typing import Final

from bnfreeze.errors import UnsafeCheckpoint

__all__ = [
    "MAX_CHANNELS",
    "MAX_DIMENSIONS",
    "MAX_HEADER_BYTES",
    "MAX_NAME_LENGTH",
    "MAX_NESTING",
    "MAX_OPCODES",
    "MAX_PICKLE_BYTES",
    "MAX_RECORDS",
    "MAX_TENSORS",
    "check_limit",
]

# A pickle spends about 30 opcodes and 150 bytes on a tensor; a large real checkpoint, with its
# optimizer, has some 10 000 tensors.
MAX_TENSORS: Final = 200_000
MAX_RECORDS: Final = MAX_TENSORS + 100
MAX_OPCODES: Final = 4_000_000
MAX_PICKLE_BYTES: Final = 32 << 20
# The JSON of a safetensors header or of a shard index.
MAX_HEADER_BYTES: Final = 32 << 20
MAX_NAME_LENGTH: Final = 1_024
MAX_NESTING: Final = 100
MAX_DIMENSIONS: Final = 64
# Of one norm layer; the widest real ones have some ten thousand.
MAX_CHANNELS: Final = 1 << 20


def check_limit(value: int, limit: int, what: str) -> None:
    """Refuse what is larger than any checkpoint needs.

    Raises:
        UnsafeCheckpoint: `value` is above `limit`; the message names both.
    """
    if value > limit:
        raise UnsafeCheckpoint(f"Refused: {value:,} {what}; bnfreeze reads no more than {limit:,}.")
