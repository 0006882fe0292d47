"""Whether this process has a kernel to launch; if not, one warning says why."""

from __future__ import annotations

import os
import threading
import warnings

import torch

from bnfreeze.errors import BnfreezeWarning
from bnfreeze.nn.cuda.build import KernelError
from bnfreeze.nn.cuda.host import real_host
from bnfreeze.nn.cuda.launch import Launcher

__all__ = ["Kernel", "kernel"]


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


kernel = Kernel()
