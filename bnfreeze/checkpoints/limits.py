"""How much a checkpoint may claim before it is refused: far above real ones, far below harm."""

from __future__ import annotations

import math
from typing import Any, Final, TypeGuard

from bnfreeze.errors import UnsafeCheckpointError, damaged

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
# NumPy before 2.0 has no more than 32, and of complex numbers one is taken for the two halves.
MAX_DIMENSIONS: Final = 30
# Of all norm layers together; the largest real networks have some hundred thousand.
MAX_CHANNELS: Final = 1 << 22
# Dicts with tensors in them: the parameters of an optimizer have one each.
MAX_DICTS: Final = 20_000
# Sizes and offsets, as torch has them; larger ones could not even be printed.
_MAX_NUMBER: Final = 2**63 - 1


def check_limit(value: int, limit: int, what: str) -> None:
    """Refuse what is larger than any checkpoint needs.

    Raises:
        UnsafeCheckpointError: `value` is above `limit`; the message names both.
    """
    if value > limit:
        raise UnsafeCheckpointError(
            f"Refused: {value:,} {what}; bnfreeze reads no more than {limit:,}."
        )


def is_size(value: object) -> TypeGuard[int]:
    """Whether a value from a file can be a size or an offset."""
    return type(value) is int and 0 <= value <= _MAX_NUMBER


def checked_shape(sizes: Any) -> tuple[int, ...]:
    """The shape that values from a file stand for.

    Whatever the dtype, the bytes that the sizes other than 0 ask for must be a number that torch
    and NumPy have: both compute it for empty tensors too.

    Raises:
        UnsafeCheckpointError: too many dimensions.
        CorruptCheckpointError: these are no sizes.
    """
    numbers = sizes if type(sizes) in {tuple, list} else [None]
    check_limit(len(numbers), MAX_DIMENSIONS, "dimensions of a tensor")
    if not all(map(is_size, numbers)) or math.prod(filter(None, numbers)) > _MAX_NUMBER // 16:
        raise damaged("the sizes of a tensor do not make sense.")
    return tuple(numbers)
