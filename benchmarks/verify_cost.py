"""What the proof costs, as ratios: run with ``python benchmarks/verify_cost.py``.

Two questions, both on ResNet-50:

1. How much does ``guard(every=1)`` on the norm tensors add to a training step? On the CPU what the
   guard adds is timed by itself, within real steps, as the difference of two runs would drown in
   the noise of the machine. On a GPU, where the check also waits for the step, steps with and
   without a guard take turns, and the difference counts.
2. How fast are ``snapshot`` and ``verify`` of all tensors, against the rate of a plain copy of
   the same tensors, ``copy_`` into memory that is there? Freed memory is kept in the process for
   this, as the first touch of memory new to it costs whatever the kernel takes to clear it. How a
   snapshot into new memory compares with a ``clone`` into new memory is the last line.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet50

import bnfreeze


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="training steps that are timed")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the memory rates")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"device    {device_name(device)}, {torch.get_num_threads()} threads")
    print(f"versions  torch {torch.__version__}, Python {platform.python_version()}")
    guarded_steps(device, options.steps)
    whole_model(device, options.rounds)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(what: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    what()
    wait(device)
    return time.perf_counter() - start


def guarded_steps(device: torch.device, steps: int) -> None:
    model = resnet50().to(device).train()
    bnfreeze.freeze(model, "eval+affine")
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9
    )
    images = torch.randn(16, 3, 224, 224, device=device)
    labels = torch.randint(1000, (16,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()
    tensors = len(bnfreeze.snapshot(model, tensors="norm"))
    timing = check_alone if device.type == "cpu" else difference
    plain, added = timing(model, step, device, steps)
    print()
    print("guard(every=1), norm tensors of ResNet-50, batch 16 at 224")
    print(f"  step       {plain * 1e3:10.1f} ms")
    print(f"  check      {added * 1e3:10.2f} ms   {tensors} tensors")
    print(f"  check/step {added / plain:10.3%}      target < 1 %")


def check_alone(
    model: nn.Module, step: Callable[[], None], device: torch.device, steps: int
) -> tuple[float, float]:
    """The median time of a step without its check, and of a check, in seconds."""
    plain, checks = [], []
    with bnfreeze.guard(model, tensors="norm") as watch:
        check = watch.check

        def timed() -> object:
            # Within the step, right after the optimizer's own work, as always.
            start = time.perf_counter()
            report = check()
            checks.append(time.perf_counter() - start)
            return report

        watch.check = timed  # type: ignore[method-assign]
        for _ in range(steps):
            plain.append(seconds(step, device) - checks[-1])
    return statistics.median(plain), statistics.median(checks[:steps])


def difference(
    model: nn.Module, step: Callable[[], None], device: torch.device, steps: int
) -> tuple[float, float]:
    """The median time of a step without a guard, and what a guard adds to it, in seconds."""
    plain, guarded = [], []
    for _ in range(steps):
        plain.append(seconds(lambda: [step() for _ in range(10)], device) / 10)
        with bnfreeze.guard(model, tensors="norm"):
            guarded.append(seconds(lambda: [step() for _ in range(10)], device) / 10)
    return statistics.median(plain), statistics.median(guarded) - statistics.median(plain)


def whole_model(device: torch.device, rounds: int) -> None:
    model = resnet50().to(device)
    tensors = [tensor.detach() for tensor in [*model.parameters(), *model.buffers()]]
    size = sum(tensor.nbytes for tensor in tensors)

    kept: list[object] = []
    fresh = in_turns(
        {
            "clone": lambda: kept.append([tensor.clone() for tensor in tensors]),
            "snapshot": lambda: kept.append(bnfreeze.snapshot(model, tensors="all")),
        },
        min(rounds, 7),
        device,
        statistics.median,  # the best would be one that found memory freed before
    )
    keep_freed_memory()
    kept.clear()

    there = [tensor.clone() for tensor in tensors]
    before = bnfreeze.snapshot(model, tensors="all")

    def copy() -> None:
        for target, source in zip(there, tensors, strict=True):
            target.copy_(source)

    best = in_turns(
        {
            "copy": copy,
            "snapshot": lambda: bnfreeze.snapshot(model, tensors="all"),
            "verify": lambda: bnfreeze.verify(model, before),
            "snapshot, digest=True": lambda: bnfreeze.snapshot(model, tensors="all", digest=True),
        },
        rounds,
        device,
    )
    print()
    print(f"the whole ResNet-50, tensors='all', {size / 1e6:.0f} MB; best of {rounds}")
    for name, value in best.items():
        print(f"  {name:<25}{value * 1e3:7.1f} ms {size / value / 1e9:8.2f} GB/s")
    both = best["snapshot"] + best["verify"]
    print(f"  snapshot+verify / copy   {2 * best['copy'] / both:7.2f}      target ≥ 0.5")
    print(f"  into new memory: snapshot / clone {fresh['clone'] / fresh['snapshot']:.2f}")


def in_turns(
    works: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    pick: Callable[[list[float]], float] = min,
) -> dict[str, float]:
    """The best time of each, in seconds; in turns, as other load then falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: pick(values) for name, values in times.items()}


def keep_freed_memory() -> None:
    """Tell glibc to give no freed memory back to the kernel."""
    if sys.platform.startswith("linux"):
        trim, mmap = -1, -3
        ctypes.CDLL(None).mallopt(mmap, 1 << 30)
        ctypes.CDLL(None).mallopt(trim, (1 << 31) - 1)


if __name__ == "__main__":
    sys.exit(main())
