"""The fixed cost of a call: a feature map of eight elements, so that there is little to compute.

The arms take turns of twenty calls; without a GPU on one core. Other load on the machine can only
add to these times, so the fastest of each hundred turns counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from benchmarks.arms import FEW_COMPILED, choose
from benchmarks.facts import BASE, Record, ratios
from benchmarks.measure import Effort, in_turns, repeated
from benchmarks.setting import Setting
from benchmarks.work_layer import trained_norm


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
        and arm.frozen  # with one value per channel, training mode is an error
        and (arm.compiled is None or (setting.size == "full" and arm.name in FEW_COMPILED))
    }
    for name, make in (
        ("forward, no grad", _no_grad),
        ("forward, grad", _with_grad),
        ("forward and backward", _and_backward),
    ):
        host = torch.device("cpu")  # on a GPU too: only the time of the host counts
        samplers = {arm: repeated(make(layer, x), 20, host) for arm, layer in layers.items()}
        effort = setting.pick(
            tiny=Effort(1, 0.0, least=1),
            quick=Effort(7, math.inf, turns=40),
            full=Effort(20, math.inf, turns=100),
        )
        with _one_core(setting):
            yield from ratios("host", {"call": name}, in_turns(samplers, effort), BASE)


@contextmanager
def _one_core(setting: Setting) -> Iterator[None]:
    """Stay on one core; not with a GPU, where backward runs on a thread of its own."""
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
