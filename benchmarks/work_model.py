"""A residual block, a training step of a ResNet-50, and the backbone of a detector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torchvision.models import detection, resnet

from benchmarks import cuda
from benchmarks.arms import ARMS, FEW_COMPILED, Arm, choose
from benchmarks.facts import BASE, Record, ratios
from benchmarks.measure import in_turns, repeated, repeats
from benchmarks.setting import LAYOUTS, PRECISIONS, Setting, activations, autocast, in_precision

# The blocks of a ResNet-50 that have no downsample branch: channels within, height at 224 × 224.
BLOCKS = ((64, 56), (128, 28), (256, 14), (512, 7))
# Compiling takes longer than measuring.
COMPILED_LAYOUT = "channels_last"


def block(setting: Setting) -> Iterable[Record]:
    """Yield the ratios of one bottleneck block, forward and backward together."""
    batch = setting.pick(tiny=1, quick=2, full=8, gpu=64)
    sizes = setting.pick(tiny=((8, 4),), quick=BLOCKS[:1], full=BLOCKS)
    for precision, layout in _cases(setting):
        for weights in ("trained", "frozen"):
            for width, height in sizes:
                setting.tell(f"block: {precision}, {layout}, {width} wide, weights {weights}")
                case = {
                    "precision": precision,
                    "layout": layout,
                    "weights": weights,
                    "block": f"{width}×{height}×{height}",
                }
                live = calibrated(resnet.Bottleneck(4 * width, width), (2, 4 * width, 8, 8))
                for module in live.modules():
                    if isinstance(module, nn.Conv2d):
                        module.requires_grad_(weights == "trained")
                torch.manual_seed(0)
                shape = batch, 4 * width, height, height
                x = activations(shape, precision, layout, setting.device).requires_grad_()
                chosen = _chosen(setting, precision, layout, width == sizes[0][0])
                works = {}
                for arm in chosen:
                    # Compiled arms run with weights that train, the common case.
                    if weights == "trained" and arm.needs_frozen_weights:
                        continue
                    if weights == "frozen" and arm.compiled is not None:
                        continue
                    model = in_precision(arm.model(live), precision, layout, setting.device)
                    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
                    works[arm.name] = partial(
                        _forward_backward, arm.ready(model), x, wanted, precision
                    )
                yield from _compared(setting, "block", case, works, (1.5, 8.0, 1.0), turns=3)


def step(setting: Setting) -> Iterable[Record]:
    """Yield the ratios of whole training steps of a ResNet-50."""
    height = setting.pick(tiny=64, quick=96, full=224)
    for precision, layout in _cases(setting):
        live = calibrated(resnet50(setting), (4, 3, 64, 64))
        chosen = _chosen(setting, precision, layout, setting.on_gpu)
        arms = [arm for arm in chosen if not arm.needs_frozen_weights]
        steps = {arm.name: Step(arm, live, precision, layout, setting.device) for arm in arms}
        for batch in _batches(setting, precision, layout):
            setting.tell(f"step: {precision}, {layout}, batch {batch}")
            torch.manual_seed(0)
            images = torch.randn(batch, 3, height, height, device=setting.device)
            images = images.contiguous(memory_format=LAYOUTS[layout])
            labels = torch.randint(1000, (batch,), device=setting.device)
            case = {
                "precision": precision,
                "layout": layout,
                "batch": f"{batch} at {height}",
            }
            works = {arm: partial(steps[arm], images, labels) for arm in steps}
            yield from _compared(setting, "step", case, works, (3.0, 40.0, 6.0), turns=2)


def backbone(setting: Setting) -> Iterable[Record]:
    """Yield the ratios of a training step of a detector's ResNet-50 with its feature pyramid."""
    height, width = setting.pick(tiny=(64, 64), quick=(200, 304), full=(800, 1216))
    batch = setting.pick(tiny=1, quick=1, full=1, gpu=2)
    cases = [("fp32", "NCHW"), ("autocast", "channels_last")]
    for precision, layout in setting.pick(tiny=cases, quick=cases[:1], full=cases):
        setting.tell(f"detection: {precision}, {layout}, {batch} × {height} × {width}")
        live = calibrated(_with_pyramid(resnet50(setting)), (2, 3, 64, 64))
        torch.manual_seed(0)
        images = torch.randn(batch, 3, height, width, device=setting.device)
        images = images.contiguous(memory_format=LAYOUTS[layout])
        works = {}
        for arm in choose(setting.arms):
            if arm.compiled is None and not arm.needs_frozen_weights:
                works[arm.name] = partial(
                    Step(arm, live, precision, layout, setting.device, part="body"), images, None
                )
        case = {"precision": precision, "layout": layout, "images": f"{batch} × {height} × {width}"}
        yield from _compared(setting, "detection", case, works, (8.0, 40.0, 6.0))


def resnet50(setting: Setting) -> resnet.ResNet:
    """Return a new ResNet-50; a tiny one has a block in each stage, and they are narrow."""
    if setting.size == "tiny":
        return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=4)
    return resnet.resnet50()


def _with_pyramid(body: resnet.ResNet) -> nn.Module:
    """A ResNet with a feature pyramid; stem and first stage are frozen as in torchvision."""
    for part in (body.conv1, body.bn1, body.layer1):
        part.requires_grad_(False)
    stages = {f"layer{number}": str(number) for number in range(1, 5)}
    return detection.backbone_utils.BackboneWithFPN(body, stages, [256, 512, 1024, 2048], 256)


# The part of a detector that is frozen.
BODY = "backbone.body"


class Detector(nn.Module):
    """Faster R-CNN with two objects in each image; it returns its losses."""

    def __init__(self, body: resnet.ResNet, height: int) -> None:
        super().__init__()
        self.backbone = _with_pyramid(copy.deepcopy(body))
        self.rest = detection.FasterRCNN(self.backbone, 91, min_size=height)
        self.height = height

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        corners = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.4, 0.3, 0.9, 0.9]], device=images.device)
        target = {
            "boxes": corners * self.height,
            "labels": torch.tensor([1, 2], device=images.device),
        }
        return self.rest(list(images), [target] * len(images))


class Step:
    """One arm's model and optimizer; a call is one training step."""

    def __init__(
        self,
        arm: Arm,
        live: nn.Module,
        precision: str,
        layout: str,
        device: torch.device,
        part: str = "",
    ) -> None:
        # The arm freezes a part of the model; the rest has no norm layers.
        if part:
            whole = copy.deepcopy(live)
            whole.set_submodule(part, arm.model(live.get_submodule(part)))
        else:
            whole = arm.model(live)
        whole = in_precision(whole, precision, layout, device)
        trained = [p for p in whole.parameters() if p.requires_grad]
        # A rate so small that the model stays nearly the same, round after round.
        self.optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)
        self.model, self.precision = arm.ready(whole), precision

    def __call__(self, images: Tensor, labels: Tensor | None) -> None:
        self.optimizer.zero_grad()
        if self.precision == "bf16":
            images = images.bfloat16()
        with autocast(self.precision, images.device):
            out = self.model(images)
            if labels is None:
                loss = sum(feature.float().square().mean() for feature in out.values())
            else:
                loss = nn.functional.cross_entropy(out, labels)
        loss.backward()
        self.optimizer.step()


def calibrated(model: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Give the norm layers statistics that fit the random weights of the model."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    torch.manual_seed(0)
    for norm in norms:
        norm.momentum = None  # the plain average
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(*shape))
    for norm in norms:
        norm.momentum = 0.1
    return model


def _cases(setting: Setting) -> Sequence[tuple[str, str]]:
    """Return every precision with every layout; for a tiny run each at least once."""
    every = tuple(product(PRECISIONS, LAYOUTS))
    return setting.pick(tiny=(every[0], every[3], every[5]), quick=every, full=every)


def _batches(setting: Setting, precision: str, layout: str) -> tuple[int, ...]:
    largest = (256,) if precision != "fp32" and layout == "channels_last" else ()
    return setting.pick(tiny=(2,), quick=(2,), full=(1, 4), gpu=(8, 64, *largest))


def _chosen(setting: Setting, precision: str, layout: str, compiled: bool) -> list[Arm]:
    """Return the arms of one case; compiled ones only if there is time for them."""
    every = tuple(arm.name for arm in ARMS)
    names = setting.pick(tiny=(), quick=FEW_COMPILED, full=every, gpu=FEW_COMPILED)
    cases = setting.pick(tiny=(), quick=("fp32",), full=PRECISIONS, gpu=("autocast",))
    compiled = compiled and layout == COMPILED_LAYOUT and precision in cases
    return [
        arm
        for arm in choose(setting.arms)
        if arm.compiled is None or (compiled and arm.name in names)
    ]


def _forward_backward(model: nn.Module, x: Tensor, wanted: list[Tensor], precision: str) -> None:
    with autocast(precision, x.device):
        out = model(x)
    torch.autograd.grad(out, wanted, torch.ones_like(out))


def _compared(
    setting: Setting,
    work: str,
    case: dict[str, str],
    works: dict[str, Callable[[], object]],
    seconds: tuple[float, float, float],
    turns: int = 1,
) -> Iterable[Record]:
    """Yield the ratios of the arms; on a GPU also of CUDA graphs of the same work.

    Args:
        setting: the options of the run.
        work: the name of the work.
        case: what distinguishes this case.
        works: what each arm does.
        seconds: the time for a quick run, a full one, and one on a GPU.
        turns: the number of turns in a round, of which the fastest counts.
    """
    effort = setting.effort(*seconds, turns)
    for way in ("eager", "graph") if setting.on_gpu else ("",):
        if way == "graph":
            pool = torch.cuda.graph_pool_handle()
            captures = {arm: partial(cuda.graph, one, pool) for arm, one in works.items()}
            works = setting.prepared(captures, "in a CUDA graph")
        # This also compiles, chooses algorithms and allocates the optimizer's state.
        works = {arm: works[arm] for arm in setting.prepared(works)}
        times = repeats(works[BASE], setting.device, effort)
        samplers = {arm: repeated(one, times, setting.device) for arm, one in works.items()}
        here = {**case, "launch": way} if way else case
        yield from ratios(work, here, in_turns(samplers, effort), BASE)
