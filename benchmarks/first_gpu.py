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
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import bnfreeze
from benchmarks import cuda, probe_cost, report, runs, work_folded, work_guard, work_host
from benchmarks.arms import ARMS, Arm, choose
from benchmarks.facts import BASE, Record, Run, over_rounds, ratios
from benchmarks.measure import Effort, in_turns, repeated, repeats
from benchmarks.setting import LAYOUTS, Setting, activations, in_precision
from benchmarks.work_layer import trained_norm
from benchmarks.work_model import BODY, Detector, Step, calibrated, resnet50

# What a kernel must read and write, in tensors of the input's size.
TRAFFIC = {"nothing": (2, 2), "relu": (2, 3), "add+relu": (3, 4)}
COMPILED = (f"compile: {BASE}", "compile: bnfreeze fused")


class Session:
    """The records measured so far, and the time that is left."""

    def __init__(self, device: torch.device, limit: float, tiny: bool) -> None:
        self.end = time.monotonic() + limit
        self.setting = Setting(device, "tiny" if tiny else "full")
        self.records: list[Record] = []
        self.folder = Path(os.environ.get("OUT") or ".")
        self.folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, records: Iterable[Record]) -> None:
        for one in records:
            self.records.append(one)
            words = [one.work, *one.case.values(), one.arm, f"{one.median:.3g} {one.unit}"]
            print(f"{self.left():5.0f} s left  " + "  ".join(words), flush=True)

    def run(self) -> Run:
        """All records, saved as ``first_gpu.json``."""
        versions, absent = runs.versions()
        device = runs.device_facts(self.setting.device)
        command = " ".join(["python -m benchmarks.first_gpu", *sys.argv[1:]])
        notes = self.setting.notes
        run = Run(command, device, versions, runs.commit(), absent, self.records, notes)
        runs.save(run, self.folder / "first_gpu.json")
        return run


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
        session.run()
    report.show(session.run(), Console(width=140))
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
    done = subprocess.run(
        ["timeout", "150", *command, "-p", "no:cacheprovider"],
        cwd=runs.HERE.parent,
        capture_output=True,
        text=True,
    )
    (session.folder / "gpu_tests.txt").write_text(done.stdout + done.stderr)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    print(*lines[-60:], sep="\n")
    session.setting.notes.append(f"Tests marked gpu: {lines[-1]}")


def arms() -> list[Arm]:
    """The ways to freeze that are compared, all of them eager."""
    names = (BASE, "torchvision FrozenBatchNorm2d", "bnfreeze fused", "bnfreeze fused-act")
    return [arm for arm in ARMS if arm.name in names]


def kernels(session: Session) -> None:
    """Measure the share of the copy bandwidth that each kernel reaches, on one large shape."""
    setting = session.setting
    device = setting.device
    rate = cuda.copy_rate(device) if setting.on_gpu else 1e10
    setting.notes.append(f"A copy of 2 GiB reads and writes {rate / 1e9:.0f} GB/s.")
    shape = setting.pick(tiny=(2, 16, 8, 8), quick=(), full=(64, 256, 56, 56))
    live = trained_norm(shape[1])
    for layout in LAYOUTS:
        x, residual = (activations(shape, "bf16", layout, device) for _ in range(2))
        x.requires_grad_()
        residual.requires_grad_()
        grad = torch.randn_like(x)
        for follow, (there, back) in TRAFFIC.items():
            for name, layer in _layers(session, live, follow):
                works = {
                    "forward": (there, partial(_run, layer, x, residual)),
                    "forward and backward": (
                        there + back,
                        partial(_both, layer, x, residual, grad, follow == "add+relu"),
                    ),
                }
                for pass_, (maps, work) in works.items():
                    # Ten calls in a row: the first one's launch is then a small part of the time.
                    times = [repeated(work, 10, device)() for _ in range(10)]
                    share = [100 * maps * x.nbytes / one / rate for one in times[1:]]
                    case = {"precision": "bf16", "layout": layout, "then": follow, "pass": pass_}
                    session.add([over_rounds("layer", case, name, share, "%", "copy_ of 2 GiB")])


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
    return _makers(chosen, live, precision, layout, images, labels)


def _makers(
    chosen: list[Arm],
    live: nn.Module,
    precision: str,
    layout: str,
    images: Tensor,
    labels: Tensor | None,
    part: str = "",
) -> dict[str, Callable[[], Callable[[], None]]]:
    def make(arm: Arm) -> Callable[[], None]:
        return partial(Step(arm, live, precision, layout, images.device, part), images, labels)

    return {arm.name: partial(make, arm) for arm in chosen}


def steps(session: Session) -> None:
    """Measure training steps of a ResNet-50, eager and as CUDA graphs, as ratios to eval."""
    for precision, layout, batch in _cases(session):
        makers = _works(session, arms(), precision, layout, batch)
        _compare(session, "step", makers, _case(precision, layout, batch))


def small(session: Session) -> None:
    """Measure steps of a batch of four, where the time of the CPU counts."""
    case = ("autocast", "channels_last", session.setting.pick(tiny=1, quick=4, full=4))
    _compare(session, "step", _works(session, arms(), *case), _case(*case))


def _case(precision: str, layout: str, batch: int) -> dict[str, str]:
    return {"precision": precision, "layout": layout, "batch": f"{batch} at 224"}


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
            case = {"model": name, "what": what, **_case(precision, "channels_last", batch)}
            _compare(session, "folded", makers, case, limit=1.0)


def host(session: Session) -> None:
    """Measure the fixed cost of a call, and of a guard."""
    tiny = session.setting.size == "tiny"
    setting = session.setting if tiny else replace(session.setting, size="quick")
    plain = replace(setting, arms=("torchvision", "bnfreeze fused"))
    large = [] if tiny else work_guard.steps(session.setting)
    session.add(itertools.chain(work_host.measure(plain), work_guard.measure(setting), large))


def compiled(session: Session) -> None:
    """Measure the compiled step in the case that most people train in."""
    if session.setting.size == "tiny":
        return
    chosen = [arm for arm in ARMS if arm.name in (BASE, *COMPILED)]
    case = ("autocast", "channels_last", 64)
    _compare(session, "step", _works(session, chosen, *case), _case(*case), graphs=False)


def _compare(
    session: Session,
    name: str,
    makers: dict[str, Callable[[], Any]],
    case: dict[str, str],
    limit: float = 4.0,
    graphs: bool = True,
) -> None:
    setting, where = session.setting, f"({', '.join(case.values())})"
    works = setting.prepared(makers, where)
    effort = setting.pick(
        tiny=Effort(1, 0.0, least=1, sample=0.0),
        quick=Effort(8, limit),
        full=Effort(8, limit),
    )
    for launch in ("eager", "graph") if setting.on_gpu and graphs else ("eager",):
        if launch == "graph":
            pool = torch.cuda.graph_pool_handle()
            captures = {arm: partial(cuda.graph, work, pool) for arm, work in works.items()}
            works = setting.prepared(captures, f"{where} in a CUDA graph")
        ran = setting.prepared(works, where)
        works = {arm: works[arm] for arm in ran}
        count = repeats(works[BASE], setting.device, effort)
        samplers = {arm: repeated(work, count, setting.device) for arm, work in works.items()}
        times = in_turns(samplers, effort)
        session.add(ratios(name, {**case, "launch": launch}, times, BASE))


def detector(session: Session) -> None:
    """Measure training steps of Faster R-CNN, whose ResNet-50 is frozen as when one fine-tunes."""
    setting = session.setting
    height, width = setting.pick(tiny=(64, 64), quick=(200, 304), full=(800, 1216))
    live = Detector(calibrated(resnet50(setting), (2, 3, 64, 64)), height)
    cases = itertools.product(
        setting.pick(tiny=(1,), quick=(2,), full=(2, 8)),
        (("fp32", "NCHW"), ("autocast", "channels_last")),
    )
    for batch, (precision, layout) in cases:
        images = torch.randn(batch, 3, height, width, device=setting.device)
        makers = _makers(arms(), live, precision, layout, images, None, part=BODY)
        shape = f"{batch} × {height} × {width}"
        case = {"precision": precision, "layout": layout, "images": shape}
        _compare(session, "detector", makers, case, limit=8.0, graphs=False)
        if setting.on_gpu:
            what = {"what": "the most allocated", **case}
            for arm, make in makers.items():
                peak = cuda.peak_mib(make, setting.device)
                session.add([over_rounds("detector", what, arm, [peak], "MiB")])


def calibration(session: Session) -> None:
    """Measure `probe` and `recalibrate` on statistics that fit, as ratios to a plain pass."""
    setting = session.setting
    batches, size = setting.pick(tiny=(1, 2), quick=(20, 64), full=(20, 64))
    height = setting.pick(tiny=64, quick=224, full=224)
    for layout, memory_format in LAYOUTS.items():
        model = resnet50(setting).to(setting.device, memory_format=memory_format)
        images = torch.randn(size, 3, height, height, device=setting.device)
        data = [images.contiguous(memory_format=memory_format)] * batches
        bnfreeze.recalibrate(model, data[:1])
        works = {
            "a plain pass": partial(probe_cost.plain, model.eval(), data),
            "probe": partial(bnfreeze.probe, model, data),
            "recalibrate": partial(bnfreeze.recalibrate, model, data),
        }
        samplers = {arm: repeated(work, 1, setting.device) for arm, work in works.items()}
        effort = setting.pick(
            tiny=Effort(1, 0.0, least=1), quick=Effort(4, 10.0), full=Effort(4, 10.0)
        )
        case = {"precision": "fp32", "layout": layout, "data": f"{batches} batches of {size}"}
        session.add(ratios("calibration", case, in_turns(samplers, effort), "a plain pass"))


def memory(session: Session) -> None:
    """Measure the peak memory of a training step."""
    if not session.setting.on_gpu:
        return
    case = ("autocast", "channels_last", 64)
    for arm, make in _works(session, arms(), *case).items():
        peak = cuda.peak_mib(make, session.setting.device)
        what = {"what": "the most allocated", **_case(*case)}
        session.add([over_rounds("memory", what, arm, [peak], "MiB")])


PARTS: dict[str, tuple[Callable[[Session], None], int]] = {
    "tests": (tests, 60),
    "kernels": (kernels, 30),
    "steps": (steps, 60),
    "small": (small, 30),
    "memory": (memory, 20),
    "detector": (detector, 40),
    "calibration": (calibration, 20),
    "host": (host, 30),
    "folding": (folding, 60),
    "compiled": (compiled, 100),
}
"""The parts, and the seconds that must be left for each."""


if __name__ == "__main__":
    sys.exit(main())
