"""How it is measured: in rounds in which every arm has its turn, in a new order each time.

Other load on the machine then slows all arms alike, so the ratio of two times of one round is more
reliable than the times. Other load only ever adds time: if a turn is short, a round has several,
and the fastest turn of each arm counts. Times on a GPU are taken with CUDA events.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Returns one sample: the seconds of one call.
Sampler = Callable[[], float]


@dataclass(frozen=True)
class Effort:
    """How long a comparison may take.

    Attributes:
        rounds: the largest number of rounds.
        seconds: no new round begins after this time.
        least: the smallest number of rounds.
        sample: the least seconds of one sample; short calls are repeated.
        turns: the number of turns in a round, of which the fastest counts.
    """

    rounds: int
    seconds: float
    least: int = 5
    sample: float = 0.002
    turns: int = 1


def in_turns(samplers: Mapping[str, Sampler], effort: Effort) -> dict[str, list[float]]:
    """Return the seconds of each arm, one for each round, after a warm-up round."""
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
    """Return how often to call ``work`` for one sample: between 1 and 1000 times."""
    work()
    once = min(seconds(work, device) for _ in range(2))
    return max(1, min(1000, round(effort.sample / max(once, 1e-7))))


def repeated(work: Callable[[], object], times: int, device: torch.device) -> Sampler:
    """Return a sampler that calls ``work`` this many times."""

    def loop() -> None:
        for _ in range(times):
            work()

    return lambda: seconds(loop, device) / times
