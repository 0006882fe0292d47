"""A GPU in one command of 8 minutes: its tests, the kernels, training steps, folding, the guard.

From a checkout, with PYTHONPATH set to it; nothing is installed and no network is needed::

    python -m benchmarks.first_gpu [PART ...] [--seconds 480]

It prints one table, and writes ``first_gpu.json`` into the folder ``$OUT``, or here, after each
part: if the time runs out, the parts before it are there. ``--tiny`` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import cuda, runs, work_folded, work_guard, work_host
from benchmarks.arms import ARMS, Arm, choose
from benchmarks.facts import BASE, quartiles
from benchmarks.measure import Effort, in_turns, repeated, repeats
from benchmarks.setting import LAYOUTS, Setting, activations, in_precision
from benchmarks.work_layer import trained_norm
from benchmarks.work_model import Step, calibrated, resnet50

# What a kernel must read and write, in tensors of the input's size.
TRAFFIC = {"nothing": (2, 2), "relu": (2, 3), "add+relu": (3, 4)}
COMPILED = (f"compile: {BASE}", "compile: bnfreeze fused")
Row = dict[str, Any]


class Session:
    """The rows measured so far, and the time that is left."""

    def __init__(self, device: torch.device, limit: float, tiny: bool) -> None:
        self.end = time.monotonic() + limit
        self.setting = Setting(device, "tiny" if tiny else "full")
        self.rows: list[Row] = []
        folder = Path(os.environ.get("OUT") or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "first_gpu.json"

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, part: str, case: str, arm: str, **figures: float | str) -> None:
        row = {"part": part, "case": case, "arm": arm, **figures}
        self.rows.append(row)
        print(f"{self.left():5.0f} s left  " + "  ".join(map(str, row.values())), flush=True)

    def save(self) -> None:
        facts = {
            "device": runs.device_facts(self.setting.device),
            "versions": runs.versions()[0],
            "commit": runs.commit(),
            "notes": self.setting.notes,
            "rows": self.rows,
        }
        self.path.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")


def main() -> int:
    """Run all parts as far as the time allows; return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_gpu")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for everything")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try it on a CPU")
    options = parser.parse_args()
    session = Session(torch.device(options.device), options.seconds, options.tiny)
    failed = False
    for name in options.parts or PARTS:
        part, least = PARTS[name]
        if session.left() < least and not options.tiny:
            session.setting.notes.append(f"{name}: left out, the time is over")
            continue
        try:
            part(session)
        except Exception as error:  # the parts after it are worth having
            session.setting.notes.append(f"{name} failed: {type(error).__name__}: {error}")
            failed = True
        session.save()
    show(session)
    return int(failed)


def tests(session: Session) -> None:
    """Run the tests marked `gpu`, in at most 150 seconds."""
    files = ("tests/gpu", "tests/ecosystem/test_compile.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        *files,
        "-m",
        "gpu",
        "-q",
        "--tb=short",
        "-rs",
        "--show-capture=no",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4", "-p", "no:benchmark"]
    if session.setting.size == "tiny":
        command.append("--collect-only")
    begin = time.monotonic()
    done = subprocess.run(
        ["timeout", "150", *command, "-p", "no:cacheprovider"],
        cwd=runs.HERE.parent,
        capture_output=True,
        text=True,
    )
    (session.path.parent / "gpu_tests.txt").write_text(done.stdout + done.stderr)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    print(*lines[-60:], sep="\n")
    session.add(
        "tests", "marked gpu", lines[-1], s=round(time.monotonic() - begin), rc=done.returncode
    )


def arms() -> list[Arm]:
    """The ways to freeze that are compared, all of them eager."""
    names = (BASE, "torchvision FrozenBatchNorm2d", "bnfreeze fused", "bnfreeze fused-act")
    return [arm for arm in ARMS if arm.name in names]


def kernels(session: Session) -> None:
    """Measure the share of the copy bandwidth that each kernel reaches, on one large shape."""
    setting = session.setting
    device = setting.device
    rate = cuda.copy_rate(device) if setting.on_gpu else 1e10
    session.add("kernels", "copy", "torch", gb_s=round(rate / 1e9))
    shape = setting.pick(tiny=(2, 16, 8, 8), quick=(), full=(64, 256, 56, 56))
    live = trained_norm(shape[1])
    for layout in LAYOUTS:
        x, residual = (activations(shape, "bf16", layout, device) for _ in range(2))
        x.requires_grad_()
        residual.requires_grad_()
        grad = torch.randn_like(x)
        with torch.no_grad():
            copy = min(repeated(lambda: grad.copy_(x), 10, device)() for _ in range(10))  # noqa: B023
        session.add(
            "kernels", f"{layout}, nothing", "copy_", forward=round(2 * x.nbytes / copy / rate, 3)
        )
        for follow, traffic in TRAFFIC.items():
            for name, layer in _layers(session, live, follow):
                works = {
                    "forward": partial(_run, layer, x, residual),
                    "both": partial(_both, layer, x, residual, grad, follow == "add+relu"),
                }
                # Ten calls in a row: the first one's launch is then a small part of the time.
                times = {
                    way: min(repeated(works[way], 10, device)() for _ in range(10))
                    for way in setting.prepared(works, f"{name}, {follow}")
                }
                if len(times) == 2:
                    size = x.nbytes
                    session.add(
                        "kernels", f"{layout}, {follow}", name,
                        forward=round(traffic[0] * size / times["forward"] / rate, 3),
                        both=round(sum(traffic) * size / times["both"] / rate, 3),
                    )  # fmt: skip


def _layers(session: Session, live: nn.BatchNorm2d, follow: str) -> Iterator[tuple[str, nn.Module]]:
    for arm in ARMS:
        if arm.name in (BASE, "bnfreeze fused-act"):
            yield arm.name, arm.layer(live, follow).to(session.setting.device)


@torch.no_grad()
def _run(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    return layer(x, residual)


def _both(layer: nn.Module, x: Tensor, residual: Tensor, grad: Tensor, adds: bool) -> None:
    torch.autograd.grad(layer(x, residual), [x, residual] if adds else [x], grad)


def _cases(session: Session) -> list[tuple[str, str, int]]:
    batch = session.setting.pick(tiny=2, quick=64, full=64)
    found = [(p, layout, batch) for p in ("bf16", "autocast") for layout in LAYOUTS]
    return found[::3] if session.setting.size == "tiny" else found


def _works(session: Session, chosen: list[Arm], precision: str, layout: str, batch: int) -> Any:
    device, height = session.setting.device, session.setting.pick(tiny=64, quick=224, full=224)
    live = calibrated(resnet50(session.setting), (2, 3, 64, 64))
    images = torch.randn(batch, 3, height, height, device=device)
    images = images.contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(1000, (batch,), device=device)
    return {
        arm.name: lambda arm=arm: partial(
            Step(arm, live, precision, layout, device), images, labels
        )
        for arm in chosen
    }


def steps(session: Session) -> None:
    """Measure training steps of a ResNet-50, eager and as CUDA graphs, as ratios to eval."""
    for precision, layout, batch in _cases(session):
        makers = _works(session, arms(), precision, layout, batch)
        _compare(session, makers, f"{precision}, {layout}, batch {batch}")


def small(session: Session) -> None:
    """Measure steps of a batch of four, where the time of the CPU counts."""
    case = ("autocast", "channels_last", session.setting.pick(tiny=1, quick=4, full=4))
    makers = _works(session, arms(), *case)
    _compare(session, makers, "{}, {}, batch {}".format(*case))


def folding(session: Session) -> None:
    """Measure forward passes and training steps of models that are frozen in whole or in part."""
    setting = session.setting
    names = (BASE, "bnfreeze fused", "bnfreeze fused-act", "bnfreeze folded", work_folded.EAGER)
    models = ("MobileNetV2",) if setting.size == "tiny" else ("ResNet-50", "MobileNetV2")
    height = setting.pick(tiny=64, quick=224, full=224)
    for name, precision in itertools.product(models, ("fp32", "bf16")):
        model = work_folded.MODELS[name]
        live = calibrated(model.make(setting), (2, 3, 64, 64))
        for what, batch in ((work_folded.FORWARD, 1), (work_folded.FORWARD, 64),
                            (work_folded.HEAD, 64), (work_folded.ALL, 64)):  # fmt: skip
            frozen = what in (work_folded.FORWARD, work_folded.HEAD)
            wanted = [*names, "bnfreeze folded+weights"] if frozen else names
            x = torch.randn(setting.pick(tiny=2, quick=batch, full=batch), 3, height, height)
            x = in_precision(nn.ParameterList([x]), precision, "channels_last", setting.device)[0]
            makers = {
                arm.name: partial(work_folded.work, arm, live, model, what, x.detach())
                for arm in choose((), ARMS)
                if arm.name in wanted
            }
            _compare(session, makers, f"{name}, {what}, {precision}, batch {batch}", limit=1.0)


def host(session: Session) -> None:
    """Measure the fixed cost of a call, and of a guard."""
    tiny = session.setting.size == "tiny"
    setting = session.setting if tiny else replace(session.setting, size="quick")
    plain = replace(setting, arms=("torchvision", "bnfreeze fused"))
    large = [] if tiny else work_guard.steps(session.setting)
    for record in itertools.chain(work_host.measure(plain), work_guard.measure(setting), large):
        case = ", ".join(record.case.values())
        figures = (record.median, record.low, record.high)
        ratio, low, high = (round(value, 3) for value in figures)
        session.add(record.work, case, record.arm, **{record.unit: ratio}, low=low, high=high)


def compiled(session: Session) -> None:
    """Measure the compiled step in the case that most people train in."""
    if session.setting.size == "tiny":
        return
    chosen = [arm for arm in ARMS if arm.name in (BASE, *COMPILED)]
    makers = _works(session, chosen, "autocast", "channels_last", 64)
    _compare(session, makers, "autocast, channels_last, batch 64, compiled")


def _compare(
    session: Session, makers: dict[str, Callable[[], Any]], case: str, limit: float = 4.0
) -> None:
    setting = session.setting
    works = setting.prepared(makers, case)
    effort = setting.pick(
        tiny=Effort(1, 0.0, least=1, sample=0.0),
        quick=Effort(8, limit),
        full=Effort(8, limit),
    )
    for way in ("eager", "graph") if setting.on_gpu and "compiled" not in case else ("eager",):
        if way == "graph":
            pool = torch.cuda.graph_pool_handle()
            captures = {arm: partial(cuda.graph, work, pool) for arm, work in works.items()}
            works = setting.prepared(captures, f"{case}, in a CUDA graph")
        ran = setting.prepared(works, case)
        works = {arm: works[arm] for arm in ran}
        count = repeats(works[BASE], setting.device, effort)
        samplers = {arm: repeated(work, count, setting.device) for arm, work in works.items()}
        times = in_turns(samplers, effort)
        for arm, column in times.items():
            pairs = [one / other for one, other in zip(column, times[BASE], strict=True)]
            low, middle, high = (round(value, 3) for value in quartiles(pairs))
            ms = round(1e3 * min(column), 2)
            session.add("step", f"{case}, {way}", arm, ratio=middle, low=low, high=high, ms=ms)


def memory(session: Session) -> None:
    """Measure the peak memory of a training step."""
    if not session.setting.on_gpu:
        return
    makers = _works(session, arms(), "autocast", "channels_last", 64)
    for arm, make in makers.items():
        peak = round(cuda.peak_mib(make, session.setting.device))
        session.add("memory", "autocast, channels_last, batch 64", arm, mib=peak)


PARTS: dict[str, tuple[Callable[[Session], None], int]] = {
    "tests": (tests, 60),
    "kernels": (kernels, 30),
    "steps": (steps, 60),
    "small": (small, 30),
    "memory": (memory, 20),
    "host": (host, 30),
    "folding": (folding, 60),
    "compiled": (compiled, 100),
}
"""The parts, and the seconds that must be left for each."""


def show(session: Session) -> None:
    """Print the table, and what went wrong."""
    table = Table("part", "case", "arm", "figures")
    for row in session.rows:
        part, case, arm, *figures = row.values()
        names = list(row)[3:]
        cells = ", ".join(f"{name} {value}" for name, value in zip(names, figures, strict=True))
        table.add_row(part, case, arm, cells)
    console = Console(width=140)
    console.print(table)
    for note in session.setting.notes:
        console.print(note, markup=False)


if __name__ == "__main__":
    sys.exit(main())
