"""Which kernel variant computes a call, and with what grid: pure arithmetic.

The names are those of ``frozen_bn.cu``, which says what each mapping does.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import Literal

from bnfreeze.nn.activations import KERNEL_NAMES

__all__ = ["ARGS", "GEOMETRY", "THREADS", "Plan", "Variant", "elementwise", "finish"]

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
class Variant:
    """One entry point; ``expression`` is the function of frozen_bn.cu that it calls."""

    expression: str

    @property
    def name(self) -> str:
        """The entry point's name in the cubin."""
        return "bnfreeze_" + re.sub(r"\W+", "_", self.expression).strip("_")


@dataclass(frozen=True)
class Plan:
    """A variant, its grid and its geometry.

    Attributes:
        variant: the entry point.
        grid: blocks in x and y, with `THREADS` threads each.
        geometry: packed as `GEOMETRY`.
        blocks: the number of partial sums for each channel; 0 if there are none.
    """

    variant: Variant
    grid: tuple[int, int]
    geometry: bytes
    blocks: int = 0


def elementwise(
    shape: tuple[int, ...],
    dtype: Dtype,
    rows: bool,
    aligned: bool,
    direction: Direction,
    activation: str | None,
    residual: int,
    processors: int,
) -> Plan | None:
    """Plan a pass over a tensor; None if it is too large for the kernel's indices.

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
    op = "Forward" if direction == "forward" else "Backward"
    op = f"{op}<{KERNEL_NAMES[activation]}, {_RESIDUALS[residual]}>"
    trained = direction == "trained"
    if rows:
        return _rows(shape, dtype, aligned, op, processors, trained)
    if trained:
        return _planes_trained(shape, dtype, aligned, op, processors)
    return _planes(shape, dtype, aligned, op)


def finish(channels: int, blocks: int) -> Plan:
    """Plan the sum over the ``blocks`` partial sums of each channel."""
    geometry = GEOMETRY.pack(blocks, channels, 0, 0, 0, 0, 0)
    return Plan(Variant("finish"), (_ceil(channels, 32), 1), geometry)


def _planes(shape: tuple[int, ...], dtype: Dtype, aligned: bool, op: str) -> Plan | None:
    channels, plane, size = _sizes(shape)
    # A vector may lie in two planes but not in three.
    lanes = _LANES[dtype] if aligned and plane >= _LANES[dtype] else 1
    tile = THREADS * UNROLL * lanes
    if plane + tile >= 2**31 or channels + tile >= 2**31:
        return None
    wide = "true" if size + tile >= _NARROW else "false"
    geometry = GEOMETRY.pack(size, channels, *fast_division(channels), plane, *fast_division(plane))
    variant = Variant(f"planes<{dtype}, {lanes}, {op}, {wide}>")
    return Plan(variant, (_ceil(size, tile), 1), geometry)


def _rows(
    shape: tuple[int, ...], dtype: Dtype, aligned: bool, op: str, processors: int, trained: bool
) -> Plan | None:
    channels, _, size = _sizes(shape)
    rows = size // channels
    lanes = _LANES[dtype] if aligned and channels % _LANES[dtype] == 0 else 1
    groups = channels // lanes
    height = THREADS // min(groups, THREADS)
    across = _ceil(groups, THREADS)
    if across > 65535:
        return None
    # Each thread gets enough rows that reading its channels' parameters (and, if trained, writing
    # the block's partial sums) costs little. At most as many blocks as keep the device busy.
    each, busy = (16, 4) if trained else (UNROLL, 8)
    down = max(1, min(_ceil(rows, height * each), busy * processors // across))
    geometry = GEOMETRY.pack(rows, channels, 0, 0, 0, 0, 0)
    flag = "true" if trained else "false"
    variant = Variant(f"rows<{dtype}, {lanes}, {op}, {flag}>")
    return Plan(variant, (down, across), geometry, down if trained else 0)


def _planes_trained(
    shape: tuple[int, ...], dtype: Dtype, aligned: bool, op: str, processors: int
) -> Plan | None:
    channels, plane, size = _sizes(shape)
    lanes = _LANES[dtype] if aligned and plane % _LANES[dtype] == 0 else 1
    vectors = size // channels // lanes
    if vectors >= 2**31 or channels >= 2**31:
        return None
    blocks = min(_ceil(vectors, THREADS * UNROLL), _ceil(8 * processors, channels), 65535)
    geometry = GEOMETRY.pack(
        vectors, channels, 0, 0, plane // lanes, *fast_division(plane // lanes)
    )
    variant = Variant(f"planes_trained<{dtype}, {lanes}, {op}>")
    return Plan(variant, (channels, blocks), geometry, blocks)


def fast_division(divisor: int) -> tuple[int, int]:
    """Return ``(magic, shift)`` so that ``(mulhi(n, magic) + n) >> shift == n // divisor``.

    For 0 <= n < 2^31, in 32-bit arithmetic. Granlund and Montgomery 1994, "Division by invariant
    integers using multiplication", figure 4.1.
    """
    shift = (divisor - 1).bit_length()
    return (2**32 * (2**shift - divisor)) // divisor + 1, shift


def _sizes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The number of channels, the elements of a plane, and those of the tensor."""
    return shape[1], math.prod(shape[2:]), math.prod(shape)


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
