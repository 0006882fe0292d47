"""Where the thresholds of `bnfreeze.probe` come from, and how well it judges with them.

Four small networks learn scikit-learn's handwritten digits, moved, turned and noisy at random, in
batches of 32 and of 8. Their running statistics are what training leaves: noisy averages over the
last batches, of a network that was still changing. Then they are probed with digits that they have
not seen, as they are (is there a false alarm?) and with stored statistics that are made wrong by a
known amount (is it found?). Seeds 0 and 1 say how small the thresholds may be. bnfreeze uses these;
they are judged on seeds 2 to 4, and by other shifts.

    nice python -m benchmarks.calibration_study [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from bnfreeze.calibration.fit import THRESHOLDS, LayerFit, Thresholds, layer_fit
from bnfreeze.calibration.measuring import Measured, as_in_evaluation, measure
from bnfreeze.norm_layers import NamedModule, named_modules

SIZES = (32, 256, 2048)
SHIFTS = (0.1, 0.3, 1.0)  # in standard deviations
FACTORS = (1.25, 2.0, 4.0)  # of the variance
MEANS, RATIOS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5), (1.2, 1.35, 1.5, 1.75, 2.0, 3.0)
ALLOWED = 0.005  # false alarms, of all layers, for means and for variances each
NEVER = 1e9


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.short: nn.Module = nn.Identity()
        if stride > 1:
            short = nn.Conv2d(before, after, 1, stride, bias=False)
            self.short = nn.Sequential(short, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.short(x))


def conv_bn(before: int, after: int, stride: int = 1, groups: int = 1, size: int = 3) -> list[Any]:
    conv = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU6()]


def resnet() -> nn.Module:
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*conv_bn(1, 16), *blocks, *head)


def plain() -> nn.Module:
    layers = [*conv_bn(1, 16), *conv_bn(16, 16), *conv_bn(16, 32, 2), *conv_bn(32, 32)]
    layers += [*conv_bn(32, 64, 2), *conv_bn(64, 64), nn.Flatten(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers)


def separable() -> nn.Module:
    layers = conv_bn(1, 16)
    for before, after, stride in ((16, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
        layers += conv_bn(before, before, stride, groups=before) + conv_bn(before, after, size=1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def perceptron() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((256, 256), (256, 256), (256, 128)):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "plain": plain,
    "separable": separable,
    "perceptron": perceptron,
}


class Digits:
    """Digits of 16 x 16, each moved, turned and made noisy at random when it is drawn."""

    def __init__(self, seed: int) -> None:
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
        images = F.interpolate(images, scale_factor=2, mode="bilinear")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        self.images, self.labels = images[order], torch.tensor(data.target)[order]

    def draw(self, count: int, *, seen: bool) -> tuple[Tensor, Tensor]:
        low, high = (0, 900) if seen else (900, len(self.images))
        # Without repetition as far as there are enough.
        picks = torch.cat([torch.randperm(high - low) for _ in range(-(-count // (high - low)))])
        picks = picks[:count] + low
        angle = (torch.rand(count) - 0.5) * 0.5
        scale = 0.85 + 0.3 * torch.rand(count)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        move = (torch.rand(2, count) - 0.5) * 0.25
        rows = [torch.stack([cos, -sin, move[0]], 1), torch.stack([sin, cos, move[1]], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), [count, 1, 16, 16], align_corners=False)
        pixels = F.grid_sample(self.images[picks], grid, align_corners=False)
        return pixels + 0.05 * torch.randn_like(pixels), self.labels[picks]


@dataclass(frozen=True)
class Trained:
    """A network as training leaves it."""

    name: str
    batch: int
    seed: int
    model: nn.Module
    digits: Digits


def trained(name: str, batch: int, seed: int, steps: int) -> Trained:
    torch.manual_seed(seed)
    digits, model = Digits(seed), NETWORKS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        pixels, labels = digits.draw(batch, seen=True)
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return Trained(name, batch, seed, model, digits)


def norm_layers(model: nn.Module) -> list[NamedModule]:
    return [e for e in named_modules(model) if hasattr(e.module, "running_mean")]


def measured(model: nn.Module, pixels: Tensor) -> Measured:
    with as_in_evaluation(model) as inner:
        return measure(inner, pixels.split(32), norm_layers(model))


def moved(entry: NamedModule, shift: Tensor | float, factor: float = 1.0) -> NamedModule:
    """The layer with a stored mean off by `shift` standard deviations, and a variance that is off.

    The data's variance is `factor` times the stored one where it fitted before.
    """
    old = entry.module
    new = type(old)(old.num_features, old.eps)
    new.running_var.copy_(old.running_var / factor)
    new.running_mean.copy_(old.running_mean + shift * (new.running_var + new.eps).sqrt())
    return replace(entry, module=new)


def uniform(size: float, channels: int) -> Tensor:
    """All channels off by the same amount, in one direction or the other."""
    return size * (torch.randint(2, (channels,)) * 2 - 1)


def normal(size: float, channels: int) -> Tensor:
    """Each channel off by another amount, by this much in the root mean square."""
    return size * torch.randn(channels)


@dataclass(frozen=True)
class Probe:
    """The layers of one network, and what they were given in one draw."""

    network: Trained
    samples: int
    layers: list[NamedModule]
    measured: Measured

    def verdict(self, entry: NamedModule, thresholds: Thresholds) -> LayerFit:
        return layer_fit(entry, self.measured.moments[entry.name], thresholds)


def draws(networks: list[Trained], most: int) -> Iterator[Probe]:
    for network in networks:
        for samples in SIZES:
            for _ in range(max(min(most, 2 * most * 32 // samples), 1)):
                pixels, _ = network.digits.draw(samples, seen=False)
                layers = norm_layers(network.model)
                yield Probe(network, samples, layers, measured(network.model, pixels))


def verdicts(probes: list[Probe], thresholds: Thresholds, change: Any = None) -> dict[str, float]:
    """The share of layers, of all probes, for each verdict; `change` makes them wrong first."""
    found = Counter(
        probe.verdict(entry if change is None else change(entry), thresholds).verdict
        for probe in probes
        for entry in probe.layers
    )
    return {
        verdict: round(found[verdict] / found.total(), 4)
        for verdict in ("fits", "uncertain", "shifted")
    }


def by_size(probes: list[Probe]) -> dict[int, list[Probe]]:
    return {size: [p for p in probes if p.samples == size] for size in SIZES}


def choose(probes: list[Probe]) -> dict[str, Any]:
    """The smallest thresholds of the grid with few false alarms at every number of samples."""
    groups = by_size(probes)

    def alarms(thresholds: Thresholds) -> float:
        return max(verdicts(group, thresholds)["shifted"] for group in groups.values())

    means = {m: alarms(replace(THRESHOLDS, mean=m, ratio=NEVER)) for m in MEANS}
    ratios = {r: alarms(replace(THRESHOLDS, mean=NEVER, ratio=r)) for r in RATIOS}
    chosen = {
        "mean": next(m for m, rate in means.items() if rate <= ALLOWED),
        "ratio": next(r for r, rate in ratios.items() if rate <= ALLOWED),
    }
    return {"false_alarms_by_mean": means, "false_alarms_by_ratio": ratios, "chosen": chosen}


def judge(probes: list[Probe], shift: Callable[[float, int], Tensor]) -> dict[str, Any]:
    """How often each verdict is given, with the thresholds that are shipped."""
    changes: dict[str, Any] = {"none": None}
    for size in SHIFTS:
        changes[f"mean off by {size} σ"] = lambda e, s=size: moved(
            e, shift(s, e.module.num_features)
        )
    for factor in FACTORS:
        changes[f"variance × {factor}"] = lambda e, f=factor: moved(e, 0.0, f)
    return {
        what: {size: verdicts(group, THRESHOLDS, change) for size, group in by_size(probes).items()}
        for what, change in changes.items()
    }


def batch_noise(networks: list[Trained]) -> dict[int, dict[str, float]]:
    """The scatter of the means of real batches / the figure that `probe` reports."""
    ratios: dict[int, list[float]] = defaultdict(list)
    for network in networks:
        pixels, _ = network.digits.draw(2048, seen=False)
        layers = norm_layers(network.model)
        whole = measured(network.model, pixels)
        for size in (2, 8, 32):
            means: dict[str, list[Tensor]] = defaultdict(list)
            with as_in_evaluation(network.model) as inner:
                for batch in pixels.split(size)[:256]:
                    for name, moments in measure(inner, [batch], layers).moments.items():
                        means[name].append(moments.mean)
            for entry in layers:
                sigma = (entry.module.running_var.double() + entry.module.eps).sqrt()
                seen = (torch.stack(means[entry.name]).std(0) / sigma).median().item()
                moments = replace(whole.moments[entry.name], batch_size=size)
                ratios[size].append(seen / layer_fit(entry, moments).batch_noise)
    return {
        size: {
            "least": min(found),
            "median": sorted(found)[len(found) // 2],
            "most": max(found),
        }
        for size, found in ratios.items()
    }


def accuracy(network: Trained, shift: float) -> float:
    """In eval mode, with the means of all layers off."""
    pixels, labels = network.digits.draw(897, seen=False)
    with as_in_evaluation(network.model) as inner:  # which puts the buffers back
        for entry in norm_layers(network.model):
            other = moved(entry, uniform(shift, entry.module.num_features))
            entry.module.running_mean.copy_(other.module.running_mean)
        return (inner(pixels).argmax(1) == labels).float().mean().item()


def study(*, quick: bool, tell: Callable[[str], object] = print) -> dict[str, Any]:
    start = time.perf_counter()
    torch.set_num_threads(1)
    steps, draws_each = (60, 2) if quick else (400, 8)
    sets: dict[str, list[Trained]] = {}
    for label, seeds in (("set", (0, 1)), ("judged", (2, 3, 4))):
        sets[label] = [
            trained(name, batch, seed, steps)
            for seed in (seeds[:1] if quick else seeds)
            for name in NETWORKS
            for batch in (32, 8)
        ]
        tell(f"{len(sets[label])} networks trained, {time.perf_counter() - start:.0f} s")
    torch.manual_seed(100)
    probes = {label: list(draws(networks, draws_each)) for label, networks in sets.items()}
    tell(f"probed, {time.perf_counter() - start:.0f} s")
    chosen = choose(probes["set"])
    tell(f"thresholds: {chosen['chosen']}, {time.perf_counter() - start:.0f} s")
    accuracies = {
        shift: [accuracy(network, shift) for network in sets["judged"]]
        for shift in (0.0, *SHIFTS, THRESHOLDS.mean)
    }
    return {
        "device": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "quick": quick,
        "networks": list(NETWORKS),
        "training_batches": [32, 8],
        "seeds": {"set": [0, 1], "judged": [2, 3, 4]},
        "layers_judged": sum(len(probe.layers) for probe in probes["judged"]),
        "probes_judged": {size: len(group) for size, group in by_size(probes["judged"]).items()},
        "thresholds": chosen,
        "shipped": {"mean": THRESHOLDS.mean, "ratio": THRESHOLDS.ratio},
        "same_shift_in_each_channel": judge(probes["set"], uniform),
        "judged": judge(probes["judged"], normal),
        "batch_noise_seen_over_reported": batch_noise(sets["judged"][: 2 * len(NETWORKS)]),
        "accuracy_with_all_means_off": {
            shift: {"mean": sum(found) / len(found), "least": min(found)}
            for shift, found in accuracies.items()
        },
        "seconds": round(time.perf_counter() - start),
    }


def table(judged: dict[str, Any]) -> str:
    """A table in Markdown: the share of layers that fit / are uncertain / are shifted."""
    lines = ["| stored statistics | " + " | ".join(f"{n} samples" for n in SIZES) + " |"]
    lines.append("| --- |" + " --- |" * len(SIZES))
    for what, sizes in judged.items():
        cells = (" / ".join(f"{100 * share:.3g}" for share in c.values()) for c in sizes.values())
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    found = study(quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k not in ("judged",)}, indent=1))
    print(table(found["judged"]))


if __name__ == "__main__":
    main()
