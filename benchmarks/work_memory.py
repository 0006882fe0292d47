"""Memory that a ResNet-50 saves for backward; on a GPU also the peak of a whole step.

Saved bytes are counted with saved-tensor hooks: each storage once, without parameters and casts or
scaled copies of them. They do not depend on the device, so one pass is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from benchmarks import cuda
from benchmarks.arms import FEW_COMPILED, Arm, choose
from benchmarks.facts import Record
from benchmarks.setting import LAYOUTS, PRECISIONS, Setting
from benchmarks.work_model import Step, resnet50
from tests.helpers import saved_mib


def measure(setting: Setting) -> Iterable[Record]:
    """Yield MiB an image, and on a GPU the MiB at the peak of a step."""
    height = setting.pick(tiny=64, quick=224, full=224)
    live = resnet50(setting)
    for precision in PRECISIONS:
        setting.tell(f"memory: {precision}")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        image = torch.randn(1, 3, height, height, dtype=dtype)
        for arm in choose(setting.arms):
            if arm.compiled is None and not arm.needs_frozen_weights:
                model = arm.model(live).to(dtype)
                mib = saved_mib(model, image, precision == "autocast")
                case = {"what": "saved for backward", "precision": precision}
                yield Record("memory", case, arm.name, "MiB", mib, mib, mib, 1)
        if setting.on_gpu:
            yield from _peaks(setting, live, precision)


def _peaks(setting: Setting, live: torch.nn.Module, precision: str) -> Iterable[Record]:
    """Yield the peak of one step of each arm, alone on the device."""
    layout = "channels_last"
    batch, height = setting.pick(tiny=(2, 64), quick=(64, 224), full=(64, 224))
    images = torch.randn(batch, 3, height, height, device=setting.device)
    images = images.contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(1000, (batch,), device=setting.device)
    case = {"what": f"peak of a step, batch {batch}", "precision": precision}

    def peak(arm: Arm) -> float:
        def make() -> Callable[[], object]:
            return partial(Step(arm, live, precision, layout, setting.device), images, labels)

        mib = cuda.peak_mib(make, setting.device)
        if arm.compiled is not None:
            torch._dynamo.reset()  # its caches keep the model alive
        return mib

    compiled = FEW_COMPILED if precision == "autocast" else ()
    arms = [
        arm
        for arm in choose(setting.arms)
        if not arm.needs_frozen_weights and (arm.compiled is None or arm.name in compiled)
    ]
    peaks = setting.prepared({arm.name: partial(peak, arm) for arm in arms}, "(peak memory)")
    for arm, mib in peaks.items():
        yield Record("memory", case, arm, "MiB", mib, mib, mib, 1)
