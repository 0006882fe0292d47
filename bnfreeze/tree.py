"""Dotted names as a tree, and values as a histogram."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

__all__ = ["BLOCKS", "Histogram", "Scale", "grouped", "outline"]

# Bars of no height to eight eighths.
BLOCKS: Final = " ▁▂▃▄▅▆▇█"

# How many names must share a beginning to be put under a heading of their own, by depth.
_ENOUGH = (4, 8)
_INDENT = "  "


def outline(names: Sequence[str]) -> list[tuple[str, int | None]]:
    """Lines of a tree: headings, and names shortened by the headings above them.

    Args:
        names: dotted names; those that belong together stand together.

    Returns:
        each line's text, indented, and the index of its name; None for a heading.
    """
    return _outline([(name.split("."), index) for index, name in enumerate(names)], 0)


def _outline(entries: list[tuple[list[str], int]], depth: int) -> list[tuple[str, int | None]]:
    lines: list[tuple[str, int | None]] = []
    pad = _INDENT * depth
    for run in _runs(entries):
        shared = _shared([parts for parts, _ in run])
        if depth < len(_ENOUGH) and shared and len(run) >= _ENOUGH[depth]:
            lines.append((pad + ".".join(run[0][0][:shared]), None))
            below = [(parts[shared:], index) for parts, index in run]
            lines += _outline(below, depth + 1)
        else:
            lines += [(pad + ".".join(parts), index) for parts, index in run]
    return lines


def _runs(entries: list[tuple[list[str], int]]) -> list[list[tuple[list[str], int]]]:
    """Neighbours whose names begin alike, up to the first segment that is no number."""
    runs: list[list[tuple[list[str], int]]] = []
    last: list[str] | None = None
    for parts, index in entries:
        head = parts[: _head(parts)]
        if runs and head == last:
            runs[-1].append((parts, index))
        else:
            runs.append([(parts, index)])
        last = head
    return runs


def _head(parts: list[str]) -> int:
    """How many segments a heading takes: numbers say nothing without the word after them."""
    for position, part in enumerate(parts, 1):
        if not part.isdigit():
            return position
    return len(parts)


def _shared(names: list[list[str]]) -> int:
    """How many leading segments all have in common, short of the whole of any."""
    most = min(map(len, names)) - 1
    first = names[0]
    for position in range(most):
        if any(parts[position] != first[position] for parts in names):
            return position
    return most


def grouped(names: Sequence[str]) -> dict[str, list[int]]:
    """The indices of names by the first segment in which the names differ."""
    split = [name.split(".") for name in names]
    # A name of a single segment would end what all have in common.
    deep = [parts for parts in split if len(parts) > 1]
    shared = _shared(deep) if deep and len(deep) == len(split) else 0
    # The tensors' own names (weight, bias) must not make groups.
    shared = max(min([shared, *(len(parts) - 2 for parts in split)]), 0)
    groups: dict[str, list[int]] = {}
    for index, parts in enumerate(split):
        groups.setdefault(".".join(parts[: min(shared + 1, len(parts))]), []).append(index)
    return groups


@dataclass(frozen=True)
class Histogram:
    """How values are spread. As text: a bar for each bin; the more values, the taller.

    Attributes:
        shares: of each bin, the share of all values in it; they may add up to less than 1 where
            values lie beyond the ends.
        edges: where the bins begin and end: one more than there are bins.
        median: of all values.
        below: whether values lie below the first edge.
        above: whether values lie above the last edge.
    """

    shares: tuple[float, ...]
    edges: tuple[float, ...]
    median: float
    below: bool = False
    above: bool = False

    def heights(self) -> list[int]:
        """How tall each bar is, in eighths of the tallest; 0 only for an empty bin."""
        top = max(self.shares) or 1.0
        return [math.ceil(8 * share / top) if share > 0 else 0 for share in self.shares]

    def __str__(self) -> str:
        bars = "".join(BLOCKS[height] for height in self.heights())
        return f"{'<' if self.below else ' '}{bars}{'>' if self.above else ''}"


class Scale:
    """One axis for the values of many layers, on which each layer's spread is drawn."""

    def __init__(self, spreads: Sequence[Sequence[float]], *, positive: bool) -> None:
        """Find the ends of the axis.

        Args:
            spreads: the deciles of each layer.
            positive: for variances: logarithmic. Otherwise linear about 0 and logarithmic beyond.
        """
        # The lowest and the highest tenth may lie beyond the ends, so that one extreme channel does
        # not leave the rest without room.
        values = [value for deciles in spreads for value in deciles[1:-1]]
        if positive:
            values = [value for value in values if value > 0]
        self._low, self._high = (min(values), max(values)) if values else (0.0, 0.0)
        if positive:
            self._place: Callable[[float], float] = lambda v: math.log(max(v, self._low, 5e-324))
            self._value: Callable[[float], float] = math.exp
        else:
            sizes = sorted(abs(value) for value in values if value) or [1.0]
            unit = max(sizes[len(sizes) // 2], 1e-300)
            self._place = lambda v: math.copysign(math.log1p(min(abs(v) / unit, 1e300)), v)
            self._value = lambda x: math.copysign(math.expm1(abs(x)) * unit, x)

    def ends(self, width: int) -> str:
        """The two ends of the axis, above the bars of `draw`."""
        low, high = f"{self._low:.2g}", f"{self._high:.2g}"
        return f" {low} {high:>{max(width - len(low) - 1, 0)}}"

    def draw(self, deciles: Sequence[float] | None, width: int) -> Histogram | str:
        """A histogram on the axis; an empty text where there are no values.

        Args:
            deciles: of the layer's values, the least and the greatest among them.
            width: how many bins the axis has.
        """
        if deciles is None:
            return ""
        start, end = self._place(self._low), self._place(self._high)
        bins = [0.0] * width
        step = (end - start) / width or 1.0
        for low, high in pairwise(deciles):
            left = (self._place(low) - start) / step
            right = (self._place(high) - start) / step
            first = min(max(int(left), 0), width - 1)
            last = min(max(int(right), first), width - 1)
            for cell in range(first, last + 1):
                overlap = min(right, cell + 1) - max(left, cell)
                share = overlap / (right - left) if right > left else 1 / (last - first + 1)
                bins[cell] += max(share, 0.0) / (len(deciles) - 1)
        inner = (self._value(start + (end - start) * i / width) for i in range(1, width))
        return Histogram(
            tuple(bins),
            (self._low, *inner, self._high),
            deciles[len(deciles) // 2],
            below=deciles[0] < self._low,
            above=deciles[-1] > self._high,
        )
