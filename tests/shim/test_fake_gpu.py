"""The tests for a GPU also run on a stand-in, except where the GPU itself must compute."""

import re
import subprocess
import sys

import pytest
import torch

from benchmarks import report, runs
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

pytestmark = pytest.mark.skipif(bool(fake_gpu.obstacle()), reason=fake_gpu.obstacle())


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return fake_gpu.build(tmp_path_factory.mktemp("fake_gpu"), fake_gpu.variants())


def run(environment, *command):
    """Run Python in a process with a fake GPU; return what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=fake_gpu.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_the_tests_for_a_gpu_pass(environment):
    tests = ["tests/gpu/test_gpu_kernel.py", "tests/shim/on_fake_gpu.py"]
    said = run(environment, "-m", "pytest", "-q", "-m", "gpu", *tests)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 30, said


def benchmarks_on_fake_gpu(folder, arguments):
    file = folder / "results.json"
    environment = fake_gpu.build(folder) | {"TORCHDYNAMO_DISABLE": "1"}
    run(environment, "-c", _CODE, *arguments, "--device", "cuda", "--json", str(file))
    return runs.load(file)


@pytest.mark.slow
def test_the_benchmarks_for_a_gpu_run(tmp_path):
    # Those that do not use the results, because nothing is computed here.
    works = ["layer", "host", "block", "step", "detection", "memory", "cold"]
    run = benchmarks_on_fake_gpu(tmp_path, [*works, "--tiny", "--arms", "bnfreeze fused"])
    assert run.device["name"] == "bnfreeze's fake GPU"
    assert run.notes == []
    assert {one.work for one in run.records} == set(works)
    layer = [one for one in run.records if one.work == "layer"]
    assert {(one.case["launch"], one.case["L2"]) for one in layer} == {
        ("eager", "cold"),
        ("graph", "cold"),
        ("graph", "warm"),
    }
    assert {one.unit for one in layer} == {"x", "%"}
    assert {one.case["launch"] for one in run.records if one.work == "step"} == {"eager", "graph"}
    peaks = [one for one in run.records if one.case.get("what", "").startswith("peak")]
    assert {one.unit for one in peaks} == {"MiB"}
    assert len(report.grids(run.records)) > 10


def test_this_process_has_none():
    assert not torch.cuda.is_available() or "fake" not in torch.cuda.get_device_name()
