"""How much host time a call on CUDA tensors takes, without a GPU: the driver does nothing.

This runs in a process of its own with the fake GPU of tests/shim. torch's CUDA tensors, allocator,
streams and dispatch are real, and so is the path to a kernel launch (cudaLaunchKernel for torch,
cuda.bindings for bnfreeze). Only the GPU behind it is missing. Everything runs on one core,
autograd's thread too, so that it measures work and not how fast the machine wakes a thread.
`BatchNorm2d.eval()` uses ATen's kernel, because cuDNN finds no GPU.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import runs
from benchmarks.facts import Record, Run
from benchmarks.setting import Setting
from tests.shim import fake_gpu

_CODE = """
import os, runpy, sys, torch
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
torch.backends.cudnn.enabled = False
try:
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
except SystemExit as end:
    sys.stderr.flush()
    os._exit(end.code or 0)  # autograd's threads may still need Python
"""


def measure(setting: Setting) -> Iterable[Record]:
    """Yield the ratios of the work `host` for CUDA tensors, on a machine without a GPU."""
    if setting.on_gpu:
        return  # there the work `host` measures it
    why = fake_gpu.obstacle()
    if why:
        setting.notes.append(f"driver: not measured: {why}.")
        return
    setting.tell("driver: a call on (1, 8, 1, 1) on CUDA, with a driver that does nothing")
    options = [] if setting.size == "full" else [f"--{setting.size}"]
    arms = ["--arms", *setting.arms] if setting.arms else []
    with tempfile.TemporaryDirectory() as folder:
        run = on_fake_gpu(Path(folder), ["host", *options, *arms])
    setting.notes.extend(f"driver: {note}" for note in run.notes)
    for one in run.records:
        # Triton needs a real driver; compiled arms ran eagerly here.
        if not one.arm.startswith("compile"):
            yield dataclasses.replace(one, work="driver")


def on_fake_gpu(folder: Path, arguments: Sequence[str]) -> Run:
    """Run the benchmarks in a process with a fake GPU, and return the run.

    Raises:
        RuntimeError: the process failed; the message ends with its output.
    """
    file = folder / "results.json"
    environment = fake_gpu.build(folder) | {"TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-c", _CODE, *arguments, "--device", "cuda", "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not file.exists():
        raise RuntimeError(f"no results: {done.stderr[-2000:].strip()}")
    return runs.load(file)
