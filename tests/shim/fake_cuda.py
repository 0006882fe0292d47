"""CUDA replaced by g++ and a fake driver: frozen_bn.cu runs on the CPU, launched as on a GPU.

Only the driver's functions and the compiler are replaced. The tensors are CPU tensors, whose
device index is -1.
"""

import ctypes
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from bnfreeze.nn.cuda.build import program
from bnfreeze.nn.cuda.launch import Launcher
from bnfreeze.nn.cuda.plan import THREADS, entry_point

SHIM = Path(__file__).with_name("cuda_shim.h")
GXX = shutil.which("g++")
PROCESSORS = 3  # few, so that a thread of the rows mapping walks many rows


def compile_all(variants, folder, *, flags=(), source=None, parts=2):
    """Compile the variants with g++ into ``parts`` libraries; return which has which name.

    ``source`` replaces the text that comes before the entry points.
    """
    variants = sorted(set(variants))
    shares = [variants[start::parts] for start in range(parts) if variants[start::parts]]
    running, where = [], {}
    for number, part in enumerate(shares):
        text = program(part)
        if source is not None:
            text = text.replace(program([]), source)
        file = folder / f"part{number}.cpp"
        file.write_text(f'#include "{SHIM}"\n{text}')
        library = file.with_suffix(".so")
        command = [GXX, "-std=c++17", "-O0", "-shared", "-fPIC", "-ffp-contract=off"]
        command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-variable"]
        running.append(subprocess.Popen([*command, *flags, str(file), "-o", str(library)]))
        where |= {entry_point(variant): library for variant in part}
    assert [process.wait() for process in running] == [0] * len(running)
    return where


class Libraries(dict):
    """Entry points by name, out of the libraries that `compile_all` has made."""

    def __init__(self, where):
        opened = {path: ctypes.CDLL(str(path)) for path in set(where.values())}
        for name, path in where.items():
            function = getattr(opened[path], name)
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint]
            self[name] = function


class FakeDriver:
    """Says yes, keeps a record, and runs what is launched; `errors` is what it says instead."""

    CUstream = int

    class CUstreamCaptureMode:
        CU_STREAM_CAPTURE_MODE_RELAXED = 2

    def __init__(self, libraries, *, seed=0):
        self.libraries = libraries
        self.seed = seed
        self.calls = []
        self.errors = {}
        self.context = 0
        self.capture_mode = 0

    def _said(self, name, *values):
        self.calls.append(name)
        queue = self.errors.get(name, [])
        return (queue.pop(0) if queue else 0, *values)

    def names(self):
        """Return what was launched, in order."""
        return [call[0] for call in self.calls if isinstance(call, tuple)]

    def cuDeviceGet(self, ordinal):
        return self._said("cuDeviceGet", ordinal)

    def cuDevicePrimaryCtxRetain(self, device):
        return self._said("cuDevicePrimaryCtxRetain", 100 + device)

    def cuCtxSetCurrent(self, context):
        self.context = context
        return self._said("cuCtxSetCurrent")

    def cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.capture_mode = self.capture_mode, mode
        return self._said("cuThreadExchangeStreamCaptureMode", before)

    def cuModuleLoadData(self, code):
        assert self.capture_mode == 2
        return self._said("cuModuleLoadData", code)

    def cuModuleGetFunction(self, module, name):
        assert module == name  # the fake compiler's cubin is the variant's name
        return self._said("cuModuleGetFunction", self.libraries[name.decode()])

    def cuLaunchKernel(self, function, across, down, deep, x, y, z, shared, stream, params, extra):
        (error,) = self._said("cuLaunchKernel")
        if error:
            return (error,)
        assert (deep, x, y, z, shared, extra) == (1, THREADS, 1, 1, 0, 0)
        assert 0 < across < 2**31
        assert 0 < down < 2**16
        self.calls.append((function.__name__, (across, down), stream))
        self.seed += 1
        function(ctypes.c_void_p.from_address(params).value, across, down, self.seed)
        return (0,)


def fake_launcher(driver, **changes):
    """Return a Launcher for CPU tensors; what differs is given by name."""
    launcher = Launcher(driver)
    launcher.cubin = lambda variant, arch: entry_point(variant).encode()
    launcher.current_device = lambda: -1
    launcher.on_device = lambda device: nullcontext()
    launcher.stream = lambda device: 7
    device = SimpleNamespace(major=9, minor=0, multi_processor_count=PROCESSORS)
    launcher.properties = lambda index: device
    vars(launcher).update(changes)
    return launcher
