"""How values are spread: a small histogram for each layer, on an axis that all share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

# Bars of no height to eight eighths.
BLOCKS: Final = " ▁▂▃▄▅▆▇█"


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
        if low == high:  # as rounded
            return f" {low}"
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
