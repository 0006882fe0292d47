"""The sanitizers find nothing in the kernel, and the shim finds bugs that are put in."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bnfreeze.nn import functional
from bnfreeze.nn.cuda import plan as plans
from bnfreeze.nn.cuda.build import program
from bnfreeze.nn.cuda.plan import entry_point
from tests.shim import fake_cuda
from tests.shim.fake_cuda import PROCESSORS, FakeDriver, Libraries, compile_all, fake_launcher

pytestmark = pytest.mark.skipif(fake_cuda.GXX is None, reason="needs g++")

HERE = Path(__file__).parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")

# shape, dtype, rows, aligned, direction, activation, residual
CASES = [
    ((2, 5, 7, 7), "bf16", False, True, "forward", "silu", 2),
    ((2, 5, 7, 7), "f32", False, True, "backward", "relu", 1),
    ((3, 9, 11), "f16", False, True, "forward", "relu", 0),
    ((3, 6, 2, 2), "f16", False, False, "backward", "hardswish", 0),
    ((3, 4, 4, 4), "f16", False, True, "trained", "relu6", 1),
    ((5, 3, 3), "f32", False, False, "trained", "silu", 0),
    ((3, 16, 5, 5), "bf16", True, True, "forward", "relu", 1),
    ((7, 13), "f32", True, False, "backward", "silu", 2),
    ((3, 2056), "f16", True, True, "trained", "relu", 1),
    ((70, 24), "bf16", True, True, "trained", "hardswish", 2),
]


def sanitizer_runtime():
    if fake_cuda.GXX is None:
        return None
    said = subprocess.run([fake_cuda.GXX, "-print-file-name=libasan.so"], capture_output=True)
    path = Path(os.fsdecode(said.stdout).strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


def written(plan):
    return entry_point(plan.variant), plan.grid, plan.geometry.hex()


def described(shape, dtype, *rest):
    """What sanitized.py needs to know of a case."""
    plan = plans.elementwise(shape, dtype, *rest, 3)
    launches = [plan, plans.finish(shape[1], plan.blocks)] if plan.blocks else [plan]
    return {
        "channels": shape[1],
        "blocks": plan.blocks,
        "bytes": math.prod(shape) * (4 if dtype == "f32" else 2),
        "launches": [written(each) for each in launches],
    }


def sanitized(cases, folder, change=None):
    """Run the cases, with one piece of the source exchanged, and return what became of it."""
    runtime = sanitizer_runtime()
    if runtime is None:
        pytest.skip("needs the address sanitizer's library")
    variants = ["finish", *(plans.elementwise(*case, 3).variant for case in cases)]
    source = program([])
    if change is not None:
        assert change[0] in source
        source = source.replace(*change)
    where = compile_all(variants, folder, flags=SANITIZERS, source=source, parts=1)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        # Python itself leaks, and fibers have stacks of their own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    asked = {"layout": plans.ARGS.format, "cases": [described(*case) for case in cases]}
    command = [sys.executable, HERE / "sanitized.py", where["bnfreeze_finish"], json.dumps(asked)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_sanitizers_find_nothing(tmp_path):
    end = sanitized(CASES, tmp_path)
    assert (end.returncode, end.stdout) == (0, "clean\n"), end.stderr[-3000:]


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        (2, "if (i + V > a.size) break;", "if (i >= a.size) break;"),
        (5, "if (j + u * stride >= a.size) break;", ""),
        (7, "if (row + u * stride >= a.size) break;", ""),
        (0, "u32 next = c + 1 == a.channels ? 0 : c + 1;", "u32 next = c + 1;"),
    ],
    ids=["past-the-end", "past-the-channel", "past-the-last-row", "past-the-last-channel"],
)
def test_an_overrun_is_found(case, old, new, tmp_path):
    end = sanitized([CASES[case]], tmp_path, (old, new))
    assert end.returncode != 0
    assert "heap-buffer-overflow" in end.stderr


def test_a_vector_at_a_misaligned_address_is_found(tmp_path):
    old = "(const typename T::raw *)from + i"
    end = sanitized([CASES[6]], tmp_path, (old, old + " + 1"))
    assert end.returncode != 0
    assert "misaligned address" in end.stderr


@pytest.mark.parametrize("nth", [None, 0, 1, 2], ids=["none", "rows", "planes_trained", "finish"])
def test_a_deleted_barrier_is_found(nth, tmp_path, monkeypatch):
    shape = (40, 8, 16, 16)  # several blocks for each channel
    parts = program([]).split("__syncthreads();")
    assert len(parts) == 4
    if nth is not None:
        parts[nth : nth + 2] = [parts[nth] + parts[nth + 1]]
    layouts = {None: (False, True), 0: (True,)}.get(nth, (False,))
    kernels = [
        plans.elementwise(shape, "f32", rows, True, direction, None, 0, PROCESSORS).variant
        for direction in ("forward", "trained")
        for rows in layouts
    ]
    source = "__syncthreads();".join(parts)
    where = compile_all(["finish", *kernels], tmp_path, source=source, parts=1)
    monkeypatch.setattr(functional, "_on_cuda", lambda x: True)
    launcher = fake_launcher(FakeDriver(Libraries(where)))
    monkeypatch.setattr(functional._kernel, "launcher", launcher)
    for rows in layouts:
        x = torch.randn(shape)
        x = x.contiguous(memory_format=torch.channels_last) if rows else x
        weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
        out = functional.frozen_batch_norm(x, torch.zeros(8), torch.ones(8), weight, bias, 0.0)
        (out * x).sum().backward()
        agree = torch.allclose(weight.grad, (x * x).sum((0, 2, 3)), rtol=1e-4)
        assert agree == (nth is None)
