"""What surrounds a launch: the driver, the compiler, and what torch knows of its devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bnfreeze.nn.cuda.build import KernelError, cubin
from bnfreeze.nn.cuda.plan import Variant

__all__ = ["Host", "real_host"]


@dataclass(frozen=True)
class Host:
    """What surrounds a launch. The tests put something else here."""

    driver: Any
    cubin: Callable[[Variant, str], bytes]
    current_device: Callable[[], int]
    on_device: Callable[[int], Any]
    stream: Callable[[int], int]
    capability: Callable[[int], tuple[int, int]]
    processors: Callable[[int], int]


def real_host() -> Host:
    """Return the host of a CUDA build of torch. Raises `KernelError` without cuda.bindings."""
    try:
        from cuda.bindings import driver

        driver.cuDriverGetVersion()
    except Exception as error:
        # cuda.bindings raises errors of its own kinds when the library is not found.
        raise KernelError(
            f"cuda.bindings is not there or finds no driver ({type(error).__name__}: {error}); "
            f"it comes with `pip install cuda-bindings`"
        ) from error
    return Host(
        driver=driver,
        cubin=cubin,
        current_device=torch._C._cuda_getDevice,  # CUDA tensors are there: it is initialized
        on_device=torch.cuda.device,
        stream=torch._C._cuda_getCurrentRawStream,
        capability=torch.cuda.get_device_capability,
        processors=lambda device: torch.cuda.get_device_properties(device).multi_processor_count,
    )
