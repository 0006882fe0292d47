"""Checkpoints far larger than what is looked at in them: sparse on disk, honest in content."""

import json
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

LAYERS = 500
MEGABYTE = 2**20


def sparse_checkpoint(path, size):
    """500 norm layers among convolutions that make up `size` bytes, which are holes."""
    norms = {}
    state = {}
    for number in range(LAYERS):
        state[f"layer{number}.conv.weight"] = torch.empty(size // LAYERS // 4)
        norm = nn.BatchNorm2d(256)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked += 7
        norms |= {f"layer{number}.bn.{name}": value for name, value in norm.state_dict().items()}
        state |= {name: value for name, value in norms.items() if name not in state}
    with torch.serialization.skip_data():
        torch.save(state, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        saved = torch.load(path, mmap=True, weights_only=True)
    for name, value in norms.items():
        saved[name].copy_(value)
    return norms


# Prints the peak memory of the process, in KiB, on stderr. (What getrusage tells is the parent's,
# where that is larger.)
MEASURED = """
import sys
from bnfreeze.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print(status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(code)
"""


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
