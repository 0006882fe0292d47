"""Frozen parts of a model: what folding norm layers into their convolutions gains on a CPU.

Time here is that of all threads of the process, not that of the clock: other load on the machine
then hardly counts. Fresh memory costs page faults, which are much of the time on a CPU. So all of
it is measured a second time, in a process whose malloc keeps the pages that are freed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import peers, runs
from benchmarks.arms import ARMS, Arm, choose
from benchmarks.facts import BASE, Record, ratios
from benchmarks.measure import Sampler, in_turns, seconds
from benchmarks.setting import LAYOUTS, Setting, in_precision
from benchmarks.work_model import calibrated, resnet50

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
# The fastest of the eager peers.
EAGER = "MMEngine efficient_conv_bn_eval"
COMPILED = (f"compile: {BASE}", "compile: efficient_conv_bn_eval pass")
# Inductor computes what depends on frozen weights alone when it compiles: without gradients only.
FREEZING = Arm(
    "compile: Inductor's freezing",
    next(arm for arm in ARMS if arm.name == BASE).freeze,
    compiled={"freezing": True},
    needs_frozen_weights=True,
)


@dataclass(frozen=True)
class Model:
    """A model, and its parts that a fine-tuning often freezes.

    Attributes:
        make: makes it.
        head: the name of what comes after the feature maps.
        first: the names of the first stages.
        peer: the library that must be installed.
    """

    make: Callable[[Setting], nn.Module]
    head: str
    first: tuple[str, ...]
    peer: str = ""


def _mobilenet(setting: Setting) -> nn.Module:
    return torchvision.models.mobilenet_v2(width_mult=0.25 if setting.size == "tiny" else 1.0)


def _efficientnet(setting: Setting) -> nn.Module:
    import timm

    return timm.create_model("efficientnet_lite0")


MODELS = {
    "MobileNetV2": Model(_mobilenet, "classifier", tuple(f"features.{n}" for n in range(7))),
    "EfficientNet-lite0": Model(
        _efficientnet, "classifier", ("conv_stem", "blocks.0", "blocks.1", "blocks.2"), "timm"
    ),
    "ResNet-50": Model(resnet50, "fc", ("conv1", "layer1", "layer2")),
}
# What is measured, and the batch.
FORWARD, HEAD = "forward, all frozen", "step, head trains"
FIRST, ALL = "step, first stages frozen", "step, all convolutions train"
BATCHES = {FORWARD: 8, HEAD: 8, FIRST: 4, ALL: 4}


def measure(setting: Setting) -> Iterable[Record]:
    """Yield the ratios for each model, for each part that may be frozen, for each malloc."""
    kept = all(os.environ.get(name) == value for name, value in KEPT.items())
    yield from _here(setting, "pages kept" if kept else "default")
    if sys.platform.startswith("linux") and not kept and not setting.on_gpu:
        yield from _with_pages_kept(setting)


def _with_pages_kept(setting: Setting) -> Iterable[Record]:
    """Measure again in a new process."""
    setting.tell("folded: again, with malloc keeping freed pages")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        size = [] if setting.size == "full" else [f"--{setting.size}"]
        arms = ["--arms", *setting.arms] if setting.arms else []
        threads = ["--threads", str(torch.get_num_threads())]
        command = [sys.executable, "-m", "benchmarks", "folded", "--device", "cpu"]
        subprocess.run(
            [*command, *size, *threads, "--json", str(path), *arms],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **KEPT},
        )
        yield from runs.load(path).records


def _here(setting: Setting, malloc: str) -> Iterator[Record]:
    cases = [*product(("fp32", "bf16"), ("channels_last", "NCHW"))]
    main = cases[0]
    models = setting.pick(tiny=("MobileNetV2",), quick=tuple(MODELS), full=tuple(MODELS))
    chosen = setting.pick(tiny=cases[:1], quick=cases[:3], full=cases)
    for (precision, layout), name in product(chosen, models):
        for what in BATCHES:
            first = (precision, layout) == main
            arms = _arms(setting, what, first)
            yield from _case(setting, name, what, precision, layout, malloc, arms, first)
    # At the very end: a process that has compiled something runs the eager arms more slowly.
    if malloc == "default" and setting.size != "tiny":
        for name, what in product(models, BATCHES if setting.size == "full" else (FORWARD,)):
            arms = choose(setting.arms, _compiled(what))
            yield from _case(setting, name, what, *main, malloc, arms, first=True)


def _case(
    setting: Setting,
    name: str,
    what: str,
    precision: str,
    layout: str,
    malloc: str,
    arms: Iterable[Arm],
    first: bool,
) -> Iterator[Record]:
    """Yield the ratios of these arms in one case; ``first`` is the one that counts most."""
    model = MODELS[name]
    if peers.is_absent(model.peer):
        return
    setting.tell(f"folded: {name}, {what}, {precision}, {layout}, malloc {malloc}")
    torch.manual_seed(0)
    live = calibrated(model.make(setting), (4, 3, 64, 64))
    height = setting.pick(tiny=64, quick=224, full=224)
    batch = setting.pick(tiny=2, quick=BATCHES[what], full=BATCHES[what])
    x = torch.randn(batch, 3, height, height)
    x = in_precision(nn.ParameterList([x]), precision, layout, setting.device)[0]
    makers = {arm.name: partial(work, arm, live, model, what, x.detach()) for arm in arms}
    works = _that_agree(setting, setting.prepared(makers), name)
    samplers = {arm: _sampler(one, setting) for arm, one in works.items()}
    times = in_turns(samplers, setting.effort(quick=20.0 if first else 3.0, full=14.0, gpu=3.0))
    case = {"model": name, "what": what, "batch": str(batch), "precision": precision,
            "layout": layout, "malloc": malloc}  # fmt: skip
    own = [arm for arm in works if arm.startswith("compile:")]
    for record in ratios("folded", case, times, BASE):
        if not own or record.arm in own:
            yield record


def _arms(setting: Setting, what: str, first: bool) -> Iterator[Arm]:
    """The eager arms of one case."""
    frozen = what in (FORWARD, HEAD)
    names = {BASE, EAGER, "bnfreeze folded+weights" if frozen else "bnfreeze folded"}
    if first or setting.size == "full":
        names.add("bnfreeze fused-act")
    return choose(setting.arms, [arm for arm in ARMS if arm.name in names])


def _compiled(what: str) -> list[Arm]:
    """What the compiled arms are measured against, and they."""
    every = [arm for arm in ARMS if arm.name in (BASE, *COMPILED)]
    return [*every, FREEZING] if what == FORWARD else every


def work(arm: Arm, live: nn.Module, model: Model, what: str, x: Tensor) -> Callable[[], Tensor]:
    """One arm's forward pass, or training step; it returns the output."""
    frozen = arm.model(live).to(device=x.device, dtype=x.dtype)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    frozen.to(memory_format=LAYOUTS["channels_last" if channels_last else "NCHW"])
    for module in frozen.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    head = frozen.get_submodule(model.head)
    if what in (FORWARD, HEAD):
        frozen.requires_grad_(False)
        head.requires_grad_(what == HEAD)
    for part in model.first if what == FIRST else ():
        frozen.get_submodule(part).requires_grad_(False)
    if what == FORWARD:
        return partial(_forward, arm.ready(frozen.eval()), x)
    trained = [p for p in frozen.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    return partial(_step, arm.ready(frozen), optimizer, x, labels)


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    out = model(x)
    nn.functional.cross_entropy(out.float(), labels).backward()
    optimizer.step()
    return out.detach()


def _that_agree(
    setting: Setting, works: dict[str, Callable[[], Tensor]], name: str
) -> dict[str, Callable[[], Tensor]]:
    """Leave out arms that fail, and those that compute something else than eval mode does."""
    outs = setting.prepared(works, f"for {name}")
    expected, found = outs[BASE].float(), {}
    for arm, out in outs.items():
        off = ((out.float() - expected).norm() / expected.norm()).item()
        if off <= 0.1:
            found[arm] = works[arm]
        else:
            note = f"{arm} computes something else for {name} (off by {off:.1g}) and was left out"
            if note not in setting.notes:
                setting.notes.append(note)
    return found


def _sampler(work: Callable[[], object], setting: Setting) -> Sampler:
    if setting.on_gpu:
        return partial(seconds, work, setting.device)

    def sample() -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    return sample
