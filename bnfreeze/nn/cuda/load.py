"""Whether there is a kernel to launch in this process; and if not, why not, said once."""

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
    """The CUDA kernel, if it can be had; once it could not, ATen for good, with one warning."""

    def __init__(self) -> None:
        self.launcher: Launcher | None = None
        self.trouble = ""
        self._lock = threading.Lock()

    def load(self) -> Launcher | None:
        """Look for the kernel, once; None if there is `trouble`."""
        with self._lock:
            if self.launcher is None and not self.trouble:
                if os.environ.get("BNFREEZE_KERNEL") == "0":
                    self.trouble = "BNFREEZE_KERNEL=0 turns the CUDA kernel off."
                elif torch.version.cuda is None:
                    self.trouble = "This torch is built for ROCm; the kernel is CUDA's."
                else:
                    try:
                        self.launcher = Launcher(real_host())
                    except KernelError as error:
                        self.give_up(error)
        return self.launcher

    def give_up(self, error: KernelError) -> None:
        """From now on ATen; the first time with a warning."""
        if self.trouble:
            return
        self.launcher, self.trouble = None, f"The CUDA kernel cannot be had: {error}."
        warnings.warn(
            f"{self.trouble} Frozen batch norm falls back to ATen: the same results, slower. "
            f"BNFREEZE_KERNEL=0 does so without this warning.",
            BnfreezeWarning,
            stacklevel=2,
        )


kernel = Kernel()
