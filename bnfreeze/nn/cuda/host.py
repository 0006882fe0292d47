"""What a launch needs from outside: the driver, the compiler, and torch's device functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bnfreeze.nn.cuda.build import KernelError, cubin
from bnfreeze.nn.cuda.plan import Variant
from bnfreeze.torch_private import _cuda_getCurrentRawStream, _cuda_getDevice

__all__ = ["Host", "real_host"]


@dataclass(frozen=True)
class Host:
    """What a launch needs from outside. The tests replace it."""

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
