"""A process with a stand-in GPU: real CUDA tensors of torch, in the host's memory.

Nothing of bnfreeze is replaced here: NVRTC compiles the kernel, and cuda.bindings launches it, on
torch's streams, in torch's contexts, from autograd's own threads. The driver that they call is in
the folder fake_gpu; its device.h says how it works. See fake_cuda.py for the kernels themselves.
"""

import itertools
import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from bnfreeze.nn.activations import ACTIVATIONS
from bnfreeze.nn.cuda.plan import _LANES, _RESIDUALS, ARGS
from tests.shim.fake_cuda import GXX, compile_all

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]


def headers():
    """Where torch's own packages keep CUDA's headers; None without them."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [path.parent for path in packages.glob("*/include/cuda_runtime_api.h")]
    return folders[0] if folders else None


def obstacle():
    """Why there can be no fake GPU here; empty if there can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    if GXX is None:
        return "needs g++"
    if torch.version.cuda is None or headers() is None:
        return "needs a CUDA build of torch and CUDA's headers"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "needs cuda.bindings"
    return "there is a real one" if torch.cuda.is_available() else ""


def build(folder, kernels=None):
    """Compile the device and kernels; return the environment of a process that has them.

    Without ``kernels`` a launch costs what it costs, and computes nothing.
    """
    device = folder / "libcuda.so.1"
    sources = sorted((HERE / "fake_gpu").glob("*.cpp"))
    assert ARGS.size == 160  # as driver.cpp has it
    include = [f"-I{HERE / 'fake_gpu'}", f"-isystem{headers()}"]
    # By this name cuda.bindings looks for the driver, and finds that it is loaded.
    named = ["-Wl,-soname,libcuda.so.1", "-o", device, "-ldl"]
    subprocess.run([GXX, *FLAGS, *include, *sources, *named], check=True)
    environment = os.environ | {
        "LD_PRELOAD": str(device),
        "FAKE_GPU_DEVICES": "2",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "BNFREEZE_CACHE": str(folder / "cubins"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    environment.pop("BNFREEZE_KERNEL", None)
    if kernels is not None:
        libraries = {str(path) for path in compile_all(kernels, folder).values()}
        environment["FAKE_GPU_KERNELS"] = ":".join(sorted(libraries))
    return environment


# Each activation with one kind of residual: the kernels themselves are tested without a fake GPU.
COMBINATIONS = [(name, kind % 3) for kind, name in enumerate(ACTIVATIONS)]


def variants():
    """The kernels of `COMBINATIONS` and of other tests in bf16, and of a residual block in fp32."""
    yield "finish"
    plain = set(itertools.product((None, "relu", "silu"), (0, 1)))
    block = {(None, 0), ("relu", 0), ("relu", 1), ("relu", 2)}
    needed = {"bf16": plain | set(COMBINATIONS), "f32": block}
    for dtype, pairs in needed.items():
        for name, kind in pairs:
            activation, residual = str(name).upper(), _RESIDUALS[kind]
            for lanes in (1, _LANES[dtype]):
                forward = f"{dtype}, {lanes}, Forward<{activation}, {residual}>"
                backward = f"{dtype}, {lanes}, Backward<{activation}, {residual}>"
                yield from (f"planes<{op}, false>" for op in (forward, backward))
                yield from (f"rows<{op}, false>" for op in (forward, backward))
                yield f"rows<{backward}, true>"
                yield f"planes_trained<{backward}>"
