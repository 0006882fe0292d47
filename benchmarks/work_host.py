"""What a call costs before there is anything to compute: a feature map of eight elements.

On a machine without a GPU our CUDA path is measured as well, on CPU tensors and against a driver
whose launch does nothing. The arms take turns after twenty calls, without a GPU on one core. What
else runs on the machine can only add to these; so of each hundred turns the fastest counts.
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import nn

from benchmarks.arms import FEW_COMPILED, choose
from benchmarks.facts import BASE, Record, ratios
from benchmarks.measure import Effort, Sampler, in_turns, repeated
from benchmarks.setting import Setting
from benchmarks.work_layer import trained_norm
from bnfreeze import FrozenBatchNorm2d, functional
from bnfreeze.kernels.host import Host
from bnfreeze.kernels.launch import Launcher

STUB = "bnfreeze fused, kernel path on a stub driver"


def measure(setting: Setting) -> Iterable[Record]:
    """Yield the ratios of a call without grad, of one with, and of forward and backward."""
    setting.tell("host: a call on (1, 8, 1, 1)")
    device = setting.device
    live = trained_norm(8)
    x = torch.randn(1, 8, 1, 1, device=device)
    layers = {
        arm.name: arm.ready(arm.layer(live, "nothing").norm.to(device))
        for arm in choose(setting.arms)
        if arm.alone
        and arm.frozen  # one value a channel has no batch to normalise with
        and (arm.compiled is None or (setting.size == "full" and arm.name in FEW_COMPILED))
    }
    if not setting.on_gpu:
        layers[STUB] = FrozenBatchNorm2d.from_batchnorm(live)
    for name, make in (
        ("forward, no grad", _no_grad),
        ("forward, grad", _with_grad),
        ("forward and backward", _and_backward),
    ):
        samplers = {}
        for arm, layer in layers.items():
            around = stub_driver if arm == STUB else nullcontext
            samplers[arm] = _within(around, repeated(make(layer, x), 20, torch.device("cpu")))
        effort = setting.pick(
            tiny=Effort(1, 0.0, least=1),
            quick=Effort(7, math.inf, turns=40),
            full=Effort(20, math.inf, turns=100),
        )
        with _one_core(setting):
            yield from ratios("host", {"call": name}, in_turns(samplers, effort), BASE)


@contextmanager
def _one_core(setting: Setting) -> Iterator[None]:
    """Stay on one core; but with a GPU backward runs on a thread that is to have its own."""
    if setting.on_gpu or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(before)})
    torch.set_num_threads(1)  # two on one core would wait for each other
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, before)


def _no_grad(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(x)

    return call


def _with_grad(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    return lambda: layer(leaf)


def _and_backward(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    leaf, ones = x.clone().requires_grad_(), torch.ones_like(x)
    wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(leaf), wanted, ones)


def _within(around: Callable, sampler: Sampler) -> Sampler:
    def sample() -> float:
        with around():
            return sampler()

    return sample


class _Result(enum.IntEnum):
    """What the real bindings return: an enum, made from an int."""

    SUCCESS = 0


class _StubDriver:
    """A driver that says yes."""

    CUstream = int

    class CUstreamCaptureMode:
        CU_STREAM_CAPTURE_MODE_RELAXED = 2

    def __getattr__(self, name: str) -> Callable[..., tuple[_Result, int]]:
        return lambda *args: (_Result(0), 1)

    def cuLaunchKernel(self, *args: object) -> tuple[_Result]:  # noqa: N802 - the driver's name
        return (_Result(0),)


@cache
def _launcher() -> Launcher:
    return Launcher(
        Host(
            driver=_StubDriver(),
            cubin=lambda variant, arch: b"",
            current_device=lambda: -1,
            on_device=lambda device: nullcontext(),
            stream=lambda device: 0,
            capability=lambda device: (9, 0),
            processors=lambda device: 132,
        )
    )


@contextmanager
def stub_driver() -> Iterator[None]:
    """Send CPU tensors down the CUDA path, and their launches nowhere."""
    before = functional._on_cuda, functional._kernel.launcher
    functional._on_cuda, functional._kernel.launcher = (lambda x: True), _launcher()
    try:
        yield
    finally:
        functional._on_cuda, functional._kernel.launcher = before
