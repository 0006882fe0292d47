"""The norm layers of a ResNet-50 alone, each with the operations after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import product

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import cuda
from benchmarks.arms import FEW_COMPILED, FOLLOWS, Arm, choose
from benchmarks.calls import Call
from benchmarks.facts import BASE, Record, over_rounds, ratios
from benchmarks.measure import Effort, Sampler, in_turns, repeated, repeats, seconds
from benchmarks.setting import LAYOUTS, PRECISIONS, Setting, activations, in_precision

NAME = "layer"
# Compiling takes longer than measuring: one shape, where the bytes are.
COMPILED_SHAPE, COMPILED_FOLLOW = (256, 56), "add+relu"

Times = dict[str, list[float]]


@cache
def shapes() -> dict[tuple[int, int], int]:
    """Count the norm layers of a ResNet-50 at 224 × 224 by number of channels and height."""
    found: Counter[tuple[int, int]] = Counter()
    with torch.device("meta"):
        model = torchvision.models.resnet50().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda m, i, o: found.update([o.shape[1:3]]))
        model(torch.empty(1, 3, 224, 224))
    return dict(found)


def measure(setting: Setting) -> Iterable[Record]:
    """Yield the ratios of each shape, and of all layers of the network together."""
    ceiling = cuda.copy_rate(setting.device) if setting.on_gpu else None
    if setting.size == "quick":
        setting.notes.append("The layer alone: two of the twelve shapes, those of the first stage.")
    if setting.on_gpu:
        # A warm backward runs several times on one forward.
        torch._functorch.config.donated_buffer = False
    for precision, layout, follow in product(PRECISIONS, LAYOUTS, FOLLOWS):
        setting.tell(f"layer: {precision}, {layout}, then {follow}")
        case = {"precision": precision, "layout": layout, "then": follow}
        yield from _all_shapes(setting, case, ceiling)


def _all_shapes(setting: Setting, case: dict[str, str], ceiling: float | None) -> Iterator[Record]:
    """Yield one case's records; ``ceiling`` is a copy's bytes a second."""
    some = {shape: shapes()[shape] for shape in ((64, 56), (256, 56))}
    table = setting.pick(tiny={(8, 4): 1, (16, 3): 2}, quick=some, full=shapes())
    batch = setting.pick(tiny=1, quick=2, full=8, gpu=64)
    plain = [arm for arm in choose(setting.arms) if arm.alone and arm.compiled is None]
    total: dict[tuple[tuple[str, str], ...], Times] = {}
    moved = {"forward": 0, "backward": 0}
    for (channels, height), count in table.items():
        shape = batch, channels, height, height
        arms = [*plain, *_compiled(setting, case, (channels, height))]
        for how, times in _compare(setting, case, shape, arms):
            here = {**case, **how, "shape": f"{channels}×{height}×{height}"}
            yield from _records(here, times, least_bytes(here, shape), ceiling)
            _add(total.setdefault(tuple(how.items()), {}), times, count, plain)
        for pass_ in moved:
            moved[pass_] += count * least_bytes({**case, "pass": pass_}, shape)
    for how, times in total.items():
        here = {**case, **dict(how), "shape": "all"}
        yield from _records(here, times, moved[here["pass"]], ceiling)


def _compiled(setting: Setting, case: dict[str, str], shape: tuple[int, int]) -> list[Arm]:
    """Return the compiled arms, if there is time to compile them."""
    if (
        setting.size != "full"
        or (shape, case["then"]) != (COMPILED_SHAPE, COMPILED_FOLLOW)
        or (setting.on_gpu and case["precision"] != "bf16")
    ):
        return []
    return [arm for arm in choose(setting.arms) if arm.alone and arm.name in FEW_COMPILED]


def _compare(
    setting: Setting, case: dict[str, str], shape: tuple[int, ...], arms: list[Arm]
) -> Iterator[tuple[dict[str, str], Times]]:
    """Yield the times of forward and backward; on a GPU also of CUDA graphs and of a warm cache."""
    precision, follow = case["precision"], case["then"]
    inputs = _inputs(setting, case, shape)
    live = trained_norm(shape[1])

    def make(arm: Arm) -> Call:
        layer = in_precision(arm.layer(live, follow), precision, case["layout"], setting.device)
        wanted = [p for p in layer.parameters() if p.requires_grad]
        call = Call(arm.ready(layer), inputs, wanted, precision)
        call.backward(call.forward())  # which also compiles
        return call

    calls = setting.prepared({arm.name: partial(make, arm) for arm in arms})
    effort = setting.effort(quick=0.3, full=1.2, gpu=0.15, turns=5)
    if setting.on_gpu:
        yield from cuda.layer_times(calls, setting, effort)
        return
    for pass_, sampler in (("forward", _forward), ("backward", _backward)):
        yield {"pass": pass_}, _times(calls, sampler, setting, effort)


def _inputs(
    setting: Setting, case: dict[str, str], shape: tuple[int, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and residuals: one of each; on a GPU more than fit into the L2 cache."""
    torch.manual_seed(0)

    def one() -> Tensor:
        return activations(shape, case["precision"], case["layout"], setting.device)

    copies = cuda.copies_past_l2(one().nbytes, setting.device) if setting.on_gpu else 1
    added = case["then"] == "add+relu"
    return [(one().requires_grad_(), one().requires_grad_(added)) for _ in range(copies)]


def _times(
    calls: dict[str, Call],
    make: Callable[[Call, int], Sampler],
    setting: Setting,
    effort: Effort,
) -> Times:
    one = calls[BASE] if BASE in calls else next(iter(calls.values()))
    # For the backward, all outputs must be in memory.
    times = min(64, repeats(one.forward, setting.device, effort))
    return in_turns({arm: make(call, times) for arm, call in calls.items()}, effort)


def _forward(call: Call, times: int) -> Sampler:
    return repeated(call.forward, times, call.inputs[0][0].device)


def _backward(call: Call, times: int) -> Sampler:
    def sample() -> float:
        outs = [call.forward() for _ in range(times)]

        def work() -> None:
            while outs:
                call.backward(outs.pop())

        return seconds(work, call.inputs[0][0].device) / times

    return sample


def trained_norm(channels: int) -> nn.BatchNorm2d:
    """Return a norm layer with random statistics, weight and bias."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (norm.weight, norm.running_var):
            tensor.uniform_(0.5, 2)
        for tensor in (norm.bias, norm.running_mean):
            tensor.normal_()
    return norm


def _add(total: Times, times: Times, count: int, arms: list[Arm]) -> None:
    """Add up the rounds of all shapes, each times the number of its layers."""
    for arm in arms:
        if arm.name not in times:
            continue
        column = times[arm.name]
        before = total.get(arm.name, [0.0] * len(column))
        # Only as many rounds as every shape has.
        total[arm.name] = [a + count * b for a, b in zip(before, column, strict=False)]


def least_bytes(case: Mapping[str, str], shape: tuple[int, ...]) -> int:
    """Return the bytes that a single pass over the feature maps must read and write."""
    element = 4 if case["precision"] == "fp32" else 2
    maps = {
        "forward": {"nothing": 2, "relu": 2, "add+relu": 3},
        "backward": {"nothing": 2, "relu": 3, "add+relu": 4},
    }[case["pass"]][case["then"]]
    return maps * element * torch.Size(shape).numel()


def _records(
    case: dict[str, str], times: Times, least: int, ceiling: float | None
) -> Iterator[Record]:
    """Yield the ratios; on a GPU also the bandwidth, in per cent of that of a plain copy."""
    yield from ratios(NAME, case, times, BASE)
    for arm, column in times.items():
        if ceiling is not None:
            share = [100 * least / one / ceiling for one in column]
            yield over_rounds(NAME, case, arm, share, "%", "copy_")
