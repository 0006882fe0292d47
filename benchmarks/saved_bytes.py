"""What a ResNet-50 keeps for backward, per image at 224 × 224, with each kind of frozen layer.

Counted by saved-tensor hooks, as in the tests: each storage once, parameters and casts of them left
out. Bytes do not depend on the device's speed, so one pass is enough.

    python -m benchmarks.saved_bytes
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import torchvision

from bnfreeze import FrozenBatchNorm2d
from tests.test_layers import saved_mib


def main() -> None:
    """Print a line for each kind of layer."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line[:10] == "model name"), "")
    print(f"device    {cpu or platform.machine()}")
    print(f"versions  torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"{'MiB an image':36}{'fp32':>8}{'bf16':>8}{'autocast':>10}")
    ours, theirs = FrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d
    for name, norm in (
        ("bnfreeze.FrozenBatchNorm2d", ours),
        ("torchvision.ops.FrozenBatchNorm2d", theirs),
        ("nn.BatchNorm2d.eval()", None),
    ):
        figures = []
        for dtype, autocast in (
            (torch.float32, False),
            (torch.bfloat16, False),
            (torch.float32, True),
        ):
            model = torchvision.models.resnet50(norm_layer=norm).to(dtype).eval()
            figures.append(saved_mib(model, torch.randn(1, 3, 224, 224, dtype=dtype), autocast))
        print(f"{name:36}{figures[0]:8.1f}{figures[1]:8.1f}{figures[2]:10.1f}")


if __name__ == "__main__":
    main()
