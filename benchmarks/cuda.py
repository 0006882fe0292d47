"""Measured on a GPU only: copy bandwidth, CUDA graphs, cold and warm L2 cache, peak memory.

A small kernel ends before the CPU has launched the next one, so eager calls in a row measure the
CPU. A CUDA graph replays the kernels without the CPU; both are reported. Reads from the L2 cache
are several times as fast as others: "cold" takes more inputs than fit into it, "warm" always the
same one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from benchmarks.calls import Call
from benchmarks.measure import Effort, Sampler, in_turns, seconds
from benchmarks.setting import Setting

Times = dict[str, list[float]]


def copy_rate(device: torch.device) -> float:
    """Return the bytes a second, read and written, of the best plain copy of 2 GiB."""
    source, target = (
        torch.empty(2**31, dtype=torch.uint8, device=device).zero_() for _ in range(2)
    )
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(20))
    return 2 * source.nbytes / best


def copies_past_l2(nbytes: int, device: torch.device) -> int:
    """Return how many inputs of this size fill the L2 cache twice; at least two."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-2 * l2 // nbytes))


def peak_mib(make: Callable[[], Callable[[], object]], device: torch.device) -> float:
    """Return the most memory that a step has allocated at once, its model included.

    Args:
        make: makes the step with its model. The second call of the step is measured.
        device: a CUDA device.
    """
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    step = make()
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def graph(work: Callable[[], object], pool: object) -> Callable[[], None]:
    """Capture the kernels of ``work`` in a CUDA graph; return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # a warm-up, as torch's notes on CUDA graphs advise
            work()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, pool=pool):
        work()
    return captured.replay


def layer_times(
    calls: Mapping[str, Call], setting: Setting, effort: Effort
) -> Iterator[tuple[dict[str, str], Times]]:
    """Yield the times of one call: forward and backward; eager and replayed; cold and warm."""
    copies = len(next(iter(calls.values())).inputs)
    many, same = list(range(copies)), [0] * copies
    pool = torch.cuda.graph_pool_handle()
    for launch, l2 in (("eager", "cold"), ("graph", "cold"), ("graph", "warm")):
        make = _eager if launch == "eager" else partial(_replayed, pool=pool)
        numbers = many if l2 == "cold" else same
        pairs = setting.prepared(
            {arm: partial(make, call, numbers, setting.device) for arm, call in calls.items()},
            f"({launch}, {l2} L2)",
        )
        for index, pass_ in enumerate(("forward", "backward")):
            times = in_turns({arm: pair[index] for arm, pair in pairs.items()}, effort)
            yield {"pass": pass_, "launch": launch, "L2": l2}, times


def _eager(call: Call, numbers: list[int], device: torch.device) -> tuple[Sampler, Sampler]:
    def forward() -> float:
        return seconds(lambda: [call.forward(n) for n in numbers], device) / len(numbers)

    def backward() -> float:
        outs = [call.forward(n) for n in numbers]

        def work() -> None:
            for number, out in zip(numbers, outs, strict=True):
                call.backward(out, number)

        return seconds(work, device) / len(numbers)

    return forward, backward


def _replayed(
    call: Call, numbers: list[int], device: torch.device, pool: object
) -> tuple[Sampler, Sampler]:
    """Capture the forwards in one graph and the backwards in another."""
    warm = len(set(numbers)) == 1
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call.backward(call.forward())
    torch.cuda.current_stream().wait_stream(side)
    forwards, backwards = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    # One stream for both: autograd runs a backward on the stream of its forward.
    stream = torch.cuda.Stream()
    with torch.cuda.graph(forwards, pool=pool, stream=stream):
        # For a warm cache, each output takes the memory of the one before.
        outs = []
        for number in numbers:
            if warm:
                outs.clear()
            outs.append(call.forward(number))
    with torch.cuda.graph(backwards, pool=pool, stream=stream):
        grads = []
        for place, number in enumerate(numbers):
            if warm:
                grads.clear()
            out = outs[0 if warm else place]
            grads.append(call.backward(out, number, retain=warm))
    grads.clear()

    def forward() -> float:
        return seconds(forwards.replay, device) / len(numbers)

    def backward() -> float:
        return seconds(backwards.replay, device) / len(numbers)

    return forward, backward
