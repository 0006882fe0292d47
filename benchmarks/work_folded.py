"""Frozen parts of a model: what folding norm layers into their convolutions gains on a CPU.

Time here is that of all threads of the process, not that of the clock: other load on the machine
then hardly counts. Fresh memory costs page faults, which are much of the time on a CPU. So all of
it is measured a second time, in a process whose malloc keeps the pages that are freed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import peers
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
    """Yield the ratios for each model, for each part that may be frozen, for each malloc.

    Each model has a process of its own, as it has in practice: what a process has allocated and
    compiled before decides how fast it gets memory later. Compiled arms have another one.
    """
    if setting.size == "tiny" or setting.on_gpu:
        for name in MODELS if setting.on_gpu else ("MobileNetV2",):
            yield from _eager(setting, name, "default")
        return
    mallocs: dict[str, dict[str, str]] = {"default": {}}
    if sys.platform.startswith("linux"):
        mallocs["pages kept"] = KEPT
    for malloc, name in product(mallocs, MODELS):
        for part in (_eager, _compiled) if malloc == "default" else (_eager,):
            yield from _alone(part, setting, name, malloc, mallocs[malloc])


def _alone(
    part: Callable[[Setting, str, str], Iterator[Record]],
    setting: Setting,
    name: str,
    malloc: str,
    variables: dict[str, str],
) -> list[Record]:
    """What a part yields in a new process with these variables of the environment."""
    child = replace(setting, tell=print)
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            threads = torch.get_num_threads()
            records, notes = pool.submit(_listed, part, child, name, malloc, threads).result()
    finally:
        for variable in variables.keys() - before.keys():
            del os.environ[variable]
    setting.notes[:] = dict.fromkeys([*setting.notes, *notes])
    return records


def _listed(
    part: Callable[[Setting, str, str], Iterator[Record]],
    setting: Setting,
    name: str,
    malloc: str,
    threads: int,
) -> tuple[list[Record], list[str]]:
    torch.set_num_threads(threads)
    return list(part(setting, name, malloc)), setting.notes


def _eager(setting: Setting, name: str, malloc: str) -> Iterator[Record]:
    cases = [*product(("fp32", "bf16"), ("channels_last", "NCHW"))]
    for case in setting.pick(tiny=cases[:1], quick=cases[:3], full=cases):
        for what in BATCHES:
            names = {BASE, EAGER}
            names.add("bnfreeze folded+weights" if what in (FORWARD, HEAD) else "bnfreeze folded")
            if case == cases[0] or setting.size == "full":
                names.add("bnfreeze fused-act")
            arms = [arm for arm in ARMS if arm.name in names]
            yield from _case(setting, name, what, *case, malloc, arms)


def _compiled(setting: Setting, name: str, malloc: str) -> Iterator[Record]:
    for what in BATCHES if setting.size == "full" else (FORWARD,):
        arms = [arm for arm in ARMS if arm.name in (BASE, *COMPILED)]
        arms += [FREEZING] if what == FORWARD else []
        for record in _case(setting, name, what, "fp32", "channels_last", malloc, arms):
            if record.arm != BASE:  # it stands in the table of the eager arms
                yield record


def _case(
    setting: Setting,
    name: str,
    what: str,
    precision: str,
    layout: str,
    malloc: str,
    arms: Iterable[Arm],
) -> Iterator[Record]:
    """Yield the ratios of these arms in one case."""
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
    chosen = choose(setting.arms, [*arms])
    makers = {arm.name: partial(work, arm, live, model, what, x.detach()) for arm in chosen}
    works = _that_agree(setting, setting.prepared(makers), name)
    main = (precision, layout) == ("fp32", "channels_last")
    samplers = {arm: _sampler(one, setting) for arm, one in works.items()}
    times = in_turns(samplers, setting.effort(quick=20.0 if main else 3.0, full=14.0, gpu=3.0))
    case = {"model": name, "what": what, "batch": str(batch), "precision": precision,
            "layout": layout, "malloc": malloc}  # fmt: skip
    yield from ratios("folded", case, times, BASE)


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
