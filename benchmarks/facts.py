"""The results of a run, as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BASE = "BatchNorm2d.eval(), affine frozen"


@dataclass(frozen=True)
class Record:
    """One figure of one arm in one case.

    Attributes:
        work: the piece of work, a name of the command line.
        case: what distinguishes this case, such as ``{"pass": "forward"}``.
        arm: the way to freeze.
        unit: ``"x"`` (a ratio of times to ``base``), ``"MiB"`` or ``"%"``.
        median: over the rounds.
        low: the lower quartile.
        high: the upper quartile.
        rounds: the number of rounds; 1 if the figure does not vary.
        base: the arm or the thing that the figure is a ratio to.
    """

    work: str
    case: Mapping[str, str]
    arm: str
    unit: str
    median: float
    low: float
    high: float
    rounds: int
    base: str = ""


@dataclass(frozen=True)
class Run:
    """One run of the command, and the machine that it was made on."""

    command: str
    device: Mapping[str, str]
    versions: Mapping[str, str]
    commit: str
    absent: Mapping[str, str]
    records: Sequence[Record] = field(repr=False)
    notes: Sequence[str] = ()


def over_rounds(
    work: str, case: Mapping[str, str], arm: str, values: Sequence[float], unit: str, base: str = ""
) -> Record:
    """Return the record of a figure that was measured once a round."""
    low, middle, high = quartiles(values)
    return Record(work, case, arm, unit, middle, low, high, len(values), base)


def ratios(
    work: str, case: Mapping[str, str], times: Mapping[str, Sequence[float]], base: str
) -> list[Record]:
    """Return each arm's times over those of ``base``, paired round by round."""
    if base not in times:
        return []
    records = []
    for arm, column in times.items():
        paired = [one / other for one, other in zip(column, times[base], strict=True)]
        records.append(over_rounds(work, case, arm, paired, "x", base))
    return records


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
