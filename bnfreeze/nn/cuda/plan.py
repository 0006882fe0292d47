"""Which kernel variant computes a call, and with what grid: pure arithmetic.

The names are those of ``frozen_bn.cu``, which says what each mapping does. A variant is written as
the function there that its entry point calls, such as ``rows<f16, 8, Forward<RELU, ADD>, false>``.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import Literal

THREADS = 256
UNROLL = 4

# struct Args of frozen_bn.cu. GEOMETRY, its end, is fixed by the plan; the rest by each call.
GEOMETRY = struct.Struct("=Q6I")
ARGS = struct.Struct(f"=14Q2f2I{GEOMETRY.size}s")

_NARROW = 2**31  # up to here 32 bits are enough, and fast_division is exact

_LANES = {"f32": 4, "f16": 8, "bf16": 8}  # elements in 16 bytes
_RESIDUALS = ("ALONE", "ADD", "AFFINE_ADD")

Dtype = Literal["f32", "f16", "bf16"]
Direction = Literal["forward", "backward", "trained"]


@dataclass(frozen=True)
class Plan:
    """A variant, its grid and its geometry.

    Attributes:
        variant: what to compile.
        grid: blocks in x and y, with `THREADS` threads each.
        geometry: packed as `GEOMETRY`.
        blocks: the number of partial sums for each channel; 0 if there are none.
    """

    variant: str
    grid: tuple[int, int]
    geometry: bytes
    blocks: int = 0


def entry_point(variant: str) -> str:
    """Return the name in the cubin of the entry point of a variant."""
    return "bnfreeze_" + re.sub(r"\W+", "_", variant).strip("_")


def elementwise(
    shape: tuple[int, ...],
    dtype: Dtype,
    rows: bool,
    aligned: bool,
    direction: Direction,
    activation: str | None,
    residual: int,
    processors: int,
) -> Plan:
    """Plan a pass over a tensor, which is not too large (see `layouts.unsupported`).

    Args:
        shape: (N, C, *), not empty.
        dtype: of the input.
        rows: whether the channels come last in memory.
        aligned: whether every pointer is a multiple of 16 bytes.
        direction: forward; backward; or backward with sums for weight and bias.
        activation: its name, or None.
        residual: 0 none, 1 plain, 2 with a norm layer of its own.
        processors: how many multiprocessors the device has.
    """
    channels, plane, size = shape[1], math.prod(shape[2:]), math.prod(shape)
    vector = _LANES[dtype] if aligned else 1
    trained = direction == "trained"
    op = "Forward" if direction == "forward" else "Backward"
    op = f"{op}<{(activation or 'none').upper()}, {_RESIDUALS[residual]}>"
    if rows:
        lanes = vector if channels % vector == 0 else 1
        groups = channels // lanes
        height = THREADS // min(groups, THREADS)
        across = _ceil(groups, THREADS)
        # Each thread gets enough rows that reading its channels' parameters (and, if trained,
        # writing the block's partial sums) costs little. At most as many blocks as keep the device
        # busy.
        each, busy = (16, 4) if trained else (UNROLL, 8)
        many = size // channels
        down = max(1, min(_ceil(many, height * each), busy * processors // across))
        variant = f"rows<{dtype}, {lanes}, {op}, {_flag(trained)}>"
        return _plan(variant, (down, across), many, channels, blocks=down if trained else 0)
    if trained:
        lanes = vector if plane % vector == 0 else 1
        vectors = size // channels // lanes
        blocks = min(_ceil(vectors, THREADS * UNROLL), _ceil(8 * processors, channels), 65535)
        variant = f"planes_trained<{dtype}, {lanes}, {op}>"
        return _plan(variant, (channels, blocks), vectors, channels, plane // lanes, blocks)
    # A vector may lie in two planes but not in three.
    lanes = vector if plane >= vector else 1
    tile = THREADS * UNROLL * lanes
    variant = f"planes<{dtype}, {lanes}, {op}, {_flag(size + tile >= _NARROW)}>"
    return _plan(variant, (_ceil(size, tile), 1), size, channels, plane)


def finish(channels: int, blocks: int) -> Plan:
    """Plan the sum over the ``blocks`` partial sums of each channel."""
    return _plan("finish", (_ceil(channels, 32), 1), blocks, channels)


def _plan(
    variant: str, grid: tuple[int, int], size: int, channels: int, plane: int = 1, blocks: int = 0
) -> Plan:
    geometry = size, channels, *fast_division(channels), plane, *fast_division(plane)
    return Plan(variant, grid, GEOMETRY.pack(*geometry), blocks)


def fast_division(divisor: int) -> tuple[int, int]:
    """Return ``(magic, shift)`` so that ``(mulhi(n, magic) + n) >> shift == n // divisor``.

    For 0 <= n < 2^31, in 32-bit arithmetic. Granlund and Montgomery 1994, "Division by invariant
    integers using multiplication", figure 4.1.
    """
    shift = (divisor - 1).bit_length()
    return (2**32 * (2**shift - divisor)) // divisor + 1, shift


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
