"""Whether this process has a kernel to launch; if not, one warning says why."""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any, Literal

import torch

from bnfreeze.errors import BnfreezeWarning
from bnfreeze.nn.cuda.build import KernelError, cubin
from bnfreeze.nn.cuda.launch import Host, Launcher
from bnfreeze.torch_private import _cuda_getCurrentRawStream, _cuda_getDevice

__all__ = ["Kernel", "kernel", "real_host"]


class Kernel:
    """The CUDA kernel. After one failure it is off for the rest of the process, with one warning.

    Attributes:
        launcher: None until `load`, and where the kernel is unavailable.
        trouble: why it is unavailable, as a sentence; empty if it is not.
    """

    def __init__(self) -> None:
        self.launcher: Launcher | None = None
        self.trouble = ""
        self._lock = threading.Lock()

    def load(self) -> Launcher | None:
        """Load the kernel once; return None if there is `trouble`."""
        with self._lock:
            if self.launcher is None and not self.trouble:
                if os.environ.get("BNFREEZE_KERNEL") == "0":
                    self.trouble = "BNFREEZE_KERNEL=0 turns the CUDA kernel off."
                elif torch.version.cuda is None:
                    self.trouble = "This torch is built for ROCm; the kernel needs CUDA."
                else:
                    try:
                        self.launcher = Launcher(real_host())
                    except KernelError as error:
                        self.give_up(error)
        return self.launcher

    def run(self, method: Literal["forward", "backward", "alone"], *arguments: Any) -> Any:
        """Call a method of the launcher; None if the kernel is unavailable, also from now on."""
        launcher = self.launcher or self.load()
        if launcher is None:
            return None
        try:
            return getattr(launcher, method)(*arguments)
        except KernelError as error:
            self.give_up(error)

    def give_up(self, error: KernelError) -> None:
        """Use ATen from now on; warn the first time."""
        if self.trouble:
            return
        self.launcher, self.trouble = None, f"CUDA kernel unavailable: {error}."
        warnings.warn(
            f"CUDA kernel unavailable: {error}; falling back to ATen. The results are the same, "
            f"but slower. Set BNFREEZE_KERNEL=0 to use ATen without this warning.",
            BnfreezeWarning,
            stacklevel=2,
        )


def real_host() -> Host:
    """Return the host of a CUDA build of torch. Raises `KernelError` without cuda.bindings."""
    try:
        from cuda.bindings import driver

        driver.cuDriverGetVersion()
    except Exception as error:
        # cuda.bindings raises errors of its own kinds when the library is not found.
        raise KernelError(
            f"cuda.bindings is not installed or finds no driver ({type(error).__name__}: {error}); "
            f"install it with `pip install cuda-bindings`"
        ) from error
    return Host(
        driver=driver,
        cubin=cubin,
        current_device=_cuda_getDevice,  # there are CUDA tensors, so CUDA is initialized
        on_device=torch.cuda.device,
        stream=_cuda_getCurrentRawStream,
        capability=torch.cuda.get_device_capability,
        processors=lambda device: torch.cuda.get_device_properties(device).multi_processor_count,
    )


kernel = Kernel()
