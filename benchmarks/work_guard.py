"""The cost of verification: a check after each step, and snapshots of a whole model.

On a CPU the check is timed by itself, between real steps, because the difference of two runs would
be lost in noise. On a GPU the check also waits for the step, so steps with and without a guard take
turns.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import bnfreeze
from benchmarks.facts import Record, over_rounds, ratios
from benchmarks.measure import Effort, in_turns, seconds
from benchmarks.setting import Setting
from benchmarks.work_model import resnet50

GUARD = "guard(every=1), all norm tensors"
WAITING = "loss.item() and no guard"


def measure(setting: Setting) -> Iterable[Record]:
    """Yield the check in per cent of a step, and the ratios of snapshot and verify to a copy."""
    yield from steps(setting)
    yield from _whole_model(setting)


def steps(setting: Setting) -> Iterable[Record]:
    """Yield what a check after each step costs, in per cent of the step."""
    batch = setting.pick(tiny=1, quick=4, full=16, gpu=64)
    height = setting.pick(tiny=64, quick=224, full=224)
    setting.tell(f"guard: steps of a ResNet-50, batch {batch} at {height}")
    model = resnet50(setting).to(setting.device).train()
    bnfreeze.freeze(model, "eval+affine")
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-6, momentum=0.9
    )
    images = torch.randn(batch, 3, height, height, device=setting.device)
    labels = torch.randint(1000, (batch,), device=setting.device)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    step()
    rounds = setting.pick(tiny=1, quick=3, full=10, gpu=10)
    found = (_difference if setting.on_gpu else _alone)(model, step, setting.device, rounds)
    case = {"what": f"each step, batch {batch} at {height}"}
    for arm, shares in found.items():
        percent = [100 * share for share in shares]
        yield over_rounds("guard", case, arm, percent, "%", "the step without it")


def _alone(
    model: nn.Module, step: Callable[[], Tensor], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Time a check right after each step, as the guard runs it."""
    shares = []
    with bnfreeze.guard(model, tensors="norm", every=sys.maxsize) as watch:
        for _ in range(rounds):
            whole = seconds(step, device)
            shares.append(seconds(watch.check, device) / whole)
    return {GUARD: shares}


def _difference(
    model: nn.Module, step: Callable[[], Tensor], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Time ten steps without a guard and ten with, in turns; and ten that wait as most loops do."""

    def ten() -> None:
        for _ in range(10):
            step()

    def ten_waiting() -> None:
        for _ in range(10):
            step().item()

    shares: dict[str, list[float]] = {GUARD: [], WAITING: []}
    for _ in range(rounds):
        plain = seconds(ten, device)
        shares[WAITING].append(seconds(ten_waiting, device) / plain - 1)
        with bnfreeze.guard(model, tensors="norm"):
            step()  # the first check is the longest, and there is one
            shares[GUARD].append(seconds(ten, device) / plain - 1)
    return shares


def _whole_model(setting: Setting) -> Iterable[Record]:
    setting.tell("guard: all tensors of a ResNet-50")
    keep_freed_memory()
    model = resnet50(setting).to(setting.device)
    tensors = [tensor.detach() for tensor in [*model.parameters(), *model.buffers()]]
    there = [tensor.clone() for tensor in tensors]
    before = bnfreeze.snapshot(model, tensors="all")

    def copy() -> None:
        for target, source in zip(there, tensors, strict=True):
            target.copy_(source)

    works = {
        "copy_": copy,
        "snapshot": lambda: bnfreeze.snapshot(model, tensors="all"),
        "verify": lambda: bnfreeze.verify(model, before),
        "snapshot, digest=True": lambda: bnfreeze.snapshot(model, tensors="all", digest=True),
    }
    samplers = {
        name: (lambda work=work: seconds(work, setting.device)) for name, work in works.items()
    }
    effort = setting.pick(
        tiny=Effort(1, 0.0, least=1), quick=Effort(10, 3.0), full=Effort(40, 30.0)
    )
    case = {"what": "all tensors of a ResNet-50"}
    yield from ratios("guard", case, in_turns(samplers, effort), "copy_")


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory.

    Otherwise the kernel must clear new pages again and again, which would be measured too.
    """
    if sys.platform.startswith("linux"):
        trim, mmap = -1, -3
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(mmap, 1 << 30)
            libc.mallopt(trim, (1 << 31) - 1)
