"""How it is measured: in rounds, where every arm has its turn, in a new order each time.

Other load on the machine then falls on all arms alike, and a ratio of two times of the same round
says more than either. It can also only add to a time: where a turn is short, a round has several,
and of each arm the fastest counts. On a GPU time is taken by CUDA events on the stream, on a CPU by
the clock.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Takes one sample: the seconds of one call.
Sampler = Callable[[], float]


@dataclass(frozen=True)
class Effort:
    """How long a comparison may take.

    Attributes:
        rounds: the most that are made.
        seconds: no further round begins after these.
        least: so many rounds are made in any case.
        sample: seconds that one sample should take at least; short calls are repeated for it.
        turns: of so many turns in a round the fastest counts.
    """

    rounds: int
    seconds: float
    least: int = 5
    sample: float = 0.002
    turns: int = 1


def in_turns(samplers: Mapping[str, Sampler], effort: Effort) -> dict[str, list[float]]:
    """Return the seconds of each arm, one for each round, after a round that warms up."""
    times: dict[str, list[float]] = {arm: [] for arm in samplers}
    order = list(samplers)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for sampler in samplers.values():
            sampler()
        begin = time.perf_counter()
        for number in range(effort.rounds):
            if number >= effort.least and time.perf_counter() - begin > effort.seconds:
                break
            fastest = dict.fromkeys(samplers, math.inf)
            for _ in range(effort.turns):
                shuffle(order)
                for arm in order:
                    fastest[arm] = min(fastest[arm], samplers[arm]())
            for arm, one in fastest.items():
                times[arm].append(one)
    finally:
        gc.enable()
    return times


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call, by CUDA events on a GPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def repeats(work: Callable[[], object], device: torch.device, effort: Effort) -> int:
    """How often to call ``work`` so that it fills one sample: at least once, at most 1000 times."""
    work()
    once = min(seconds(work, device) for _ in range(2))
    return max(1, min(1000, round(effort.sample / max(once, 1e-7))))


def repeated(work: Callable[[], object], times: int, device: torch.device) -> Sampler:
    """Return a sampler that calls ``work`` so many times."""

    def loop() -> None:
        for _ in range(times):
            work()

    return lambda: seconds(loop, device) / times
