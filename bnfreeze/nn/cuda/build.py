"""From the CUDA source to a cubin: NVRTC, and a cache on disk.

We compile to a cubin and not to PTX. An NVRTC newer than the driver writes PTX that the driver
refuses, while machine code for the device's own architecture loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from bnfreeze.files import replacement
from bnfreeze.nn.cuda.plan import entry_point

_OPTIONS = ("--std=c++17", "--fmad=false")


class KernelError(Exception):
    """The kernel is unavailable; the message says why. bnfreeze catches it and uses ATen."""


def cubin(variant: str, arch: str) -> bytes:
    """Return the cubin with the entry point of ``variant``, from the cache if it is there.

    Args:
        variant: what to compile.
        arch: the device's own architecture, such as ``"sm_90"``.

    Raises:
        KernelError: NVRTC is not installed, or refuses.
    """
    source, version = program([variant]), bindings("nvrtc").nvrtcVersion()
    key = hashlib.sha256(repr((source, arch, version, _OPTIONS)).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    code = _read(path)
    if code is None:
        code = compile_source(source, arch)
        _write(path, code)
    return code


def program(variants: Iterable[str]) -> str:
    """Return the source with an entry point for each of ``variants``."""
    source = (resources.files(__package__) / "frozen_bn.cu").read_text(encoding="utf-8")
    return source + "".join(f"ENTRY({entry_point(each)}, {each})\n" for each in variants)


def compile_source(source: str, arch: str) -> bytes:
    """Compile with NVRTC to a cubin for ``arch``. Raises `KernelError`."""
    nvrtc = bindings("nvrtc")
    success = nvrtc.nvrtcResult.NVRTC_SUCCESS
    error, handle = nvrtc.nvrtcCreateProgram(source.encode(), b"frozen_bn.cu", 0, [], [])
    if error != success:
        raise KernelError(f"NVRTC could not start: {error!r}")
    try:
        options = [option.encode() for option in (*_OPTIONS, f"--gpu-architecture={arch}")]
        (error,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
        if error != success:
            log = b" " * nvrtc.nvrtcGetProgramLogSize(handle)[1]
            nvrtc.nvrtcGetProgramLog(handle, log)
            text = log.decode(errors="replace").strip("\0 \n") or repr(error)
            raise KernelError(f"NVRTC did not compile the kernel for {arch}: {text}")
        code: bytes = b" " * nvrtc.nvrtcGetCUBINSize(handle)[1]
        (error,) = nvrtc.nvrtcGetCUBIN(handle, code)
        if error != success:
            raise KernelError(f"NVRTC returned no cubin for {arch}: {error!r}")
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


def cache_folder() -> Path:
    """Return the folder of the cubins: BNFREEZE_CACHE, or ``bnfreeze`` in the user's cache."""
    if chosen := os.environ.get("BNFREEZE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "bnfreeze" / "cache"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "bnfreeze"


def _read(path: Path) -> bytes | None:
    """The cubin in a cache file, or None. The file begins with the digest of the rest."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    # A cache that cannot be written is no error: the next process compiles again.
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacement(path) as fresh:
            fresh.write_bytes(hashlib.sha256(code).digest() + code)


def bindings(part: Literal["driver", "nvrtc"]) -> Any:
    """Return ``cuda.bindings.driver`` or ``cuda.bindings.nvrtc``, whose library must be there.

    Raises:
        KernelError: it is not; the message says what to install.
    """
    try:
        module = importlib.import_module(f"cuda.bindings.{part}")
        getattr(module, {"driver": "cuDriverGetVersion", "nvrtc": "nvrtcVersion"}[part])()
    except Exception as error:
        # cuda.bindings raises errors of its own kinds when the library is not found.
        raise KernelError(
            f"cuda.bindings.{part} does not work ({type(error).__name__}: {error}); install it "
            f"with `pip install cuda-bindings nvidia-cuda-nvrtc`"
        ) from error
    return module
