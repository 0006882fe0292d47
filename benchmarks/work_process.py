"""Measured in separate processes: the command `inspect`, and the first call of the CUDA kernel.

Both are compared with a bare ``import torch``, because other programs of this kind begin with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.facts import Record, over_rounds, ratios
from benchmarks.measure import in_turns
from benchmarks.setting import Setting
from tests.checkpoints.formats import MEASURED, sparse_checkpoint

_IMPORT = """
import sys, torch
status = open("/proc/self/status").read()
print(status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""
# Prints the seconds of the first call in a warm process. Then it exits at once: a thread of
# autograd that still needs Python while Python shuts down would abort the process.
_FIRST_CALL = """
import os, sys, time, torch
from bnfreeze import FrozenBatchNorm2d
x = torch.randn(8, 64, 56, 56, device="cuda", requires_grad=True)
layer = FrozenBatchNorm2d(64).cuda()
x.mul(2).sum().backward()
torch.cuda.synchronize()
begin = time.perf_counter()
layer(x, x, "relu").sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - begin, file=sys.stderr, flush=True)
os._exit(0)
"""
# Without a GPU: the two variants of a first forward and backward, compiled for sm_90.
_COMPILE = """
import sys, time, torch
from bnfreeze.nn.cuda import plan
from bnfreeze.nn.cuda.build import cubin
begin = time.perf_counter()
for direction in ("forward", "backward"):
    made = plan.elementwise((8, 64, 56, 56), "bf16", True, True, direction, "relu", 1, 132)
    cubin(made.variant, "sm_90")
print(time.perf_counter() - begin, file=sys.stderr)
"""
_SECONDS_TO_IMPORT = """
import sys, time
begin = time.perf_counter()
import torch
print(time.perf_counter() - begin, file=sys.stderr)
"""
IMPORT = "import torch"


def inspect(setting: Setting) -> Iterable[Record]:
    """Yield the time and the peak memory of the command over the size of the file."""
    if not sys.platform.startswith("linux"):
        setting.notes.append("inspect: not measured; its memory is read from Linux.")
        return
    sizes = {"0.1 GB": 10**8, "1 GB": 10**9, "10 GB": 10**10}
    names = setting.pick(tiny=("0.1 GB",), quick=("0.1 GB", "1 GB"), full=tuple(sizes))
    for name in names:
        setting.tell(f"inspect: a checkpoint of {name}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "large.pt"
            sparse_checkpoint(path, sizes[name])
            codes = {
                "bnfreeze inspect": (MEASURED, "inspect", str(path), "--json"),
                IMPORT: (_IMPORT,),
            }
            peaks: dict[str, list[float]] = {arm: [] for arm in codes}
            samplers = {
                arm: partial(_whole_process, code, peaks[arm]) for arm, code in codes.items()
            }
            effort = setting.effort(quick=5.0, full=30.0, gpu=10.0)
            times = in_turns(samplers, effort)
        case = {"file": name}
        yield from ratios("inspect", case, times, IMPORT)
        for arm, column in peaks.items():
            yield over_rounds("inspect", case, arm, column, "MiB")


def cold_start(setting: Setting) -> Iterable[Record]:
    """Yield the time of the first call, with an empty and with a full kernel cache."""
    what = "first call" if setting.on_gpu else "two variants compiled for sm_90"
    setting.tell(f"cold: {what}")
    code = _FIRST_CALL if setting.on_gpu else _COMPILE
    with tempfile.TemporaryDirectory() as full:
        try:
            _seconds(code, full)
        except subprocess.CalledProcessError as error:
            last = error.stderr.strip().rpartition("\n")[2]
            setting.notes.append(f"cold: not measured: {last}")
            return

        def empty() -> float:
            with tempfile.TemporaryDirectory() as folder:
                return _seconds(code, folder)

        samplers = {
            "empty cache": empty,
            "full cache": lambda: _seconds(code, full),
            IMPORT: lambda: _seconds(_SECONDS_TO_IMPORT, full),
        }
        times = in_turns(samplers, setting.effort(quick=5.0, full=40.0, gpu=30.0))
    yield from ratios("cold", {"what": what}, times, IMPORT)


def _whole_process(code: tuple[str, ...], peaks: list[float]) -> float:
    begin = time.perf_counter()
    done = _run(code, {})
    peaks.append(int(done.split()[-1]) / 1024)
    return time.perf_counter() - begin


def _seconds(code: str, cache: str) -> float:
    return float(_run((code,), {"BNFREEZE_CACHE": cache}).split()[-1])


def _run(code: tuple[str, ...], more: Mapping[str, str]) -> str:
    """Run Python code in a new process; return what it wrote to stderr."""
    root = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", *code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths, **more},
    )
    return done.stderr
