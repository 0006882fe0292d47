"""What `bnfreeze.probe` and `recalibrate` cost: the time of a ResNet-50's plain pass is 1.

    python -m benchmarks.probe_cost [--json FILE]

One thread, and the process's own CPU time, which other processes disturb less than the clock's. The
runs take turns. Each is compared with the plain pass of the same turn, and the median counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import nn

import bnfreeze

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def settled() -> nn.Module:
    """A ResNet-50 whose statistics fit, as a pretrained one's do, so that probe runs once."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    bnfreeze.recalibrate(model, [torch.randn(16, 3, 224, 224)])
    return model.eval()


def plain(model: nn.Module, data: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for images in data:
            model(images)


def cpu_time(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(turns: int) -> dict[str, dict[str, float]]:
    found = {}
    for layout, memory_format in LAYOUTS.items():
        model = settled().to(memory_format=memory_format)
        data = [torch.randn(8, 3, 224, 224).contiguous(memory_format=memory_format)] * 2
        runs: dict[str, Callable[[], object]] = {
            "plain": lambda m=model, d=data: plain(m, d),
            "probe": lambda m=model, d=data: bnfreeze.probe(m, d),
            "recalibrate": lambda m=model, d=data: bnfreeze.recalibrate(m, d),
        }
        for run in runs.values():
            run()  # warm
        each = [{name: cpu_time(run) for name, run in runs.items()} for _ in range(turns)]
        found[layout] = {"plain_seconds": round(median(turn["plain"] for turn in each), 3)} | {
            name: round(median(turn[name] / turn["plain"] for turn in each), 3)
            for name in ("probe", "recalibrate")
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the numbers")
    parser.add_argument("--turns", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line for line in info if "model name" in line]
    found = {
        "device": names[0].partition(":")[2].strip() if names else platform.machine(),
        "torch": torch.__version__,
        "batches": "2 of 8 images, 224 x 224, fp32, one thread",
        "results": measure(options.turns),
    }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
