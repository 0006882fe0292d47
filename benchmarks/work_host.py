"""What a call costs before there is anything to compute: a feature map of eight elements.

On a machine without a GPU our CUDA path is measured as well, on CPU tensors and against a driver
whose launch does nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from benchmarks.arms import FEW_COMPILED, choose
from benchmarks.facts import BASE, Record, ratios
from benchmarks.measure import Sampler, in_turns, repeated
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
        times = setting.pick(tiny=1, quick=500, full=2000)
        samplers = {}
        for arm, layer in layers.items():
            around = stub_driver if arm == STUB else nullcontext
            samplers[arm] = _within(around, repeated(make(layer, x), times, torch.device("cpu")))
        effort = setting.effort(quick=3.0, full=30.0, gpu=10.0)
        yield from ratios("host", {"call": name}, in_turns(samplers, effort), BASE)


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


_STUB = Launcher(
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
    functional._on_cuda, functional._kernel.launcher = (lambda x: True), _STUB
    try:
        yield
    finally:
        functional._on_cuda, functional._kernel.launcher = before
