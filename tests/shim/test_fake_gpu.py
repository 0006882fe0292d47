"""What is tested on a GPU is tested without one too, but for what the GPU itself computes."""

import json
import re
import subprocess
import sys

import fake_gpu
import pytest
import torch

pytestmark = pytest.mark.skipif(bool(fake_gpu.obstacle()), reason=fake_gpu.obstacle())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return fake_gpu.build(tmp_path_factory.mktemp("fake_gpu"))


@pytest.fixture
def environment(built):
    return dict(built)


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
    said = run(environment, "-m", "pytest", "-q", "tests/gpu", "tests/shim/on_fake_gpu.py")
    assert int(re.search(r"(\d+) passed", said)[1]) >= 30, said


def test_the_benchmarks_for_a_gpu_run(environment, tmp_path):
    # Nobody looks at what the models compute; and Triton, which wants a driver of its own, is not
    # to be asked.
    del environment["FAKE_GPU_KERNELS"]
    environment["TORCHDYNAMO_DISABLE"] = "1"
    code = (
        "import runpy, torch; torch.backends.cudnn.enabled = False; "
        "runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)"
    )
    works, file = ["layer", "host", "step", "memory", "cold", "guard"], tmp_path / "results.json"
    options = ["--tiny", "--device", "cuda", "--json", str(file)]
    arms = ["--arms", "BatchNorm2d.eval", "bnfreeze fused"]
    run(environment, "-c", code, *works, *options, *arms)
    results = json.loads(file.read_text())
    assert results["device"]["name"] == "bnfreeze's fake GPU"
    assert results["notes"] == []
    assert {table["work"] for table in results["tables"]} >= set(works)


def test_this_process_has_none():
    assert not torch.cuda.is_available() or "fake" not in torch.cuda.get_device_name()
