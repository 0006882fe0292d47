"""Checkpoints far larger than what is looked at in them: sparse on disk, honest in content."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.checkpoints.formats import LAYERS, MEASURED, sparse_checkpoint

MEGABYTE = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the memory")
@pytest.mark.parametrize(
    "size", [10**9, pytest.param(10**10, marks=pytest.mark.slow)], ids=["1GB", "10GB"]
)
def test_memory_grows_with_the_norm_layers_and_not_with_the_file(size, tmp_path):
    path = tmp_path / "large.pt"
    norms = sparse_checkpoint(path, size)
    assert os.stat(path).st_blocks * 512 < 64 * MEGABYTE < size < path.stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "inspect", path, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (file,) = json.loads(done.stdout)["files"]
    assert len(file["layers"]) == LAYERS
    assert file["bytes"] > size
    last = file["layers"][-1]
    assert last["name"] == f"layer{LAYERS - 1}.bn"
    assert last["var"]["high"] == norms[f"layer{LAYERS - 1}.bn.running_var"].max().item()
    assert last["batches"] == 7
    # torch alone takes several hundred; here it is not even imported.
    assert int(done.stderr) * 1024 < 200 * MEGABYTE


def whole_model(path, size):
    """500 norm layers among convolutions of `size` bytes, saved whole; the values are holes."""
    layers = []
    for _ in range(LAYERS):
        layers += [nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
        layers[-3].weight = nn.Parameter(torch.empty(size // LAYERS // 4))
    with torch.serialization.skip_data():
        torch.save({"model": nn.Sequential(*layers)}, path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the memory")
def test_of_a_large_whole_model_the_norm_layers_alone_are_read(tmp_path):
    path = tmp_path / "large.pt"
    whole_model(path, 10**9)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "inspect", path, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (file,) = json.loads(done.stdout)["files"]
    assert len(file["layers"]) == LAYERS
    assert {layer["kind"] for layer in file["layers"]} == {"BatchNorm2d"}
    assert file["bytes"] > 10**9
    assert int(done.stderr) * 1024 < 200 * MEGABYTE
