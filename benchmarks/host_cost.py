"""What a call costs the CPU before the GPU has anything to do.

Our eager CUDA path runs here on CPU tensors and against a stub driver whose launch does nothing;
`nn.BatchNorm2d.eval()` runs on CPU, where on a tensor of eight elements it is all overhead as
well. On a machine with a GPU the same is measured on it, with the real driver.

What counts is the ratio. The two take turns after twenty calls, without a GPU on one core. What
else runs on the machine can only add to a round; so of each hundred rounds the fastest counts, on
either side. Shown are the medians of twenty times that, and the range of their ratios.

    python benchmarks/host_cost.py
"""

from __future__ import annotations

import enum
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from bnfreeze import FrozenBatchNorm2d, functional
from bnfreeze.kernels.host import Host
from bnfreeze.kernels.launch import Launcher


class Result(enum.IntEnum):
    """What the real bindings return: an enum, made from an int."""

    SUCCESS = 0


class StubDriver:
    """A driver that says yes."""

    CUstream = int

    class CUstreamCaptureMode:
        CU_STREAM_CAPTURE_MODE_RELAXED = 2

    def __getattr__(self, name: str) -> Callable[..., tuple[Result, int]]:
        return lambda *args: (Result(0), 1)

    def cuLaunchKernel(self, *args: object) -> tuple[Result]:  # noqa: N802 - the driver's name
        return (Result(0),)


def install_stub() -> None:
    """Send CPU tensors down the CUDA path."""
    host = Host(
        driver=StubDriver(),
        cubin=lambda variant, arch: b"",
        current_device=lambda: -1,
        on_device=lambda device: nullcontext(),
        stream=lambda device: 0,
        capability=lambda device: (9, 0),
        processors=lambda device: 132,
    )
    functional._on_cuda = lambda x: True
    functional._kernel.launcher = Launcher(host)


def microseconds(call: Callable[[], object], times: int = 20) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times * 1e6


def main() -> None:
    """Print a table: each way of calling, in microseconds, and the ratio with its range."""
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    # With a GPU, backward runs on a thread of its own, which is to have a core of its own.
    if hasattr(os, "sched_setaffinity") and not on_gpu:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if not on_gpu:
        install_stub()
    device = "cuda" if on_gpu else "cpu"
    where = torch.cuda.get_device_name() if on_gpu else "stub driver"
    print(f"torch {torch.__version__}, {platform.machine()}, {where}")
    frozen = FrozenBatchNorm2d(8).to(device)
    live = nn.BatchNorm2d(8).to(device).eval().requires_grad_(False)
    x = torch.randn(1, 8, 1, 1, device=device)
    leaf = x.clone().requires_grad_()
    ones = torch.ones_like(x)

    def no_grad(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(x)

    def with_grad(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(leaf)

    def and_backward(layer: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(layer(leaf), leaf, ones)

    print(f"{'':22}{'ours µs':>10}{'BatchNorm2d µs':>16}{'ratio':>8}  range")
    for name, make in (
        ("forward, no grad", no_grad),
        ("forward, grad", with_grad),
        ("forward and backward", and_backward),
    ):
        ours, theirs = make(frozen), make(live)
        for _ in range(500):  # to warm up
            ours(), theirs()
        fastest = []
        for _ in range(20):
            rounds = [(microseconds(ours), microseconds(theirs)) for _ in range(100)]
            fastest.append([min(column) for column in zip(*rounds, strict=True)])
        ratios = sorted(a / b for a, b in fastest)
        a, b = (statistics.median(column) for column in zip(*fastest, strict=True))
        middle = statistics.median(ratios)
        print(f"{name:22}{a:10.1f}{b:16.1f}{middle:8.2f}  {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
