"""Whether this process has a kernel to launch; if not, one warning says why."""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any, Literal

import torch

from bnfreeze.errors import BnfreezeWarning
from bnfreeze.nn.cuda.build import KernelError, bindings
from bnfreeze.nn.cuda.launch import Launcher


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
        """Load the kernel once; return None if there is `trouble`. Raises `KernelError`."""
        with self._lock:
            if self.launcher is None and not self.trouble:
                if os.environ.get("BNFREEZE_KERNEL") == "0":
                    self.trouble = "BNFREEZE_KERNEL=0 turns the CUDA kernel off."
                elif torch.version.cuda is None:
                    self.trouble = "This torch is built for ROCm; the kernel needs CUDA."
                else:
                    self.launcher = Launcher(bindings("driver"))
        return self.launcher

    def run(self, method: Literal["forward", "backward", "alone"], *arguments: Any) -> Any:
        """Call a method of the launcher; None if the kernel is unavailable, also from now on."""
        try:
            launcher = self.launcher or self.load()
            return None if launcher is None else getattr(launcher, method)(*arguments)
        except KernelError as error:
            if not self.trouble:
                self.launcher, self.trouble = None, f"CUDA kernel unavailable: {error}."
                warnings.warn(
                    f"CUDA kernel unavailable: {error}; falling back to ATen. The results are the "
                    f"same, but slower. Set BNFREEZE_KERNEL=0 to use ATen without this warning.",
                    BnfreezeWarning,
                    stacklevel=2,
                )
            return None


kernel = Kernel()
