"""The private names of torch that bnfreeze uses, in one place, with the reason for each.

torch may rename them in any release. Then this module fails at import, or
``tests/nn/test_torch_private.py`` fails, and says which name it was.

Some private names are attributes of an object and cannot be imported. `MODULE_ATTRIBUTES` and
`TENSOR_ATTRIBUTES` list them for that test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch._C import (
    DisableTorchFunctionSubclass,
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "MODULE_ATTRIBUTES",
    "TENSOR_ATTRIBUTES",
    "DeviceContext",  # the function mode behind torch.set_default_device, which is harmless
    "DisableTorchFunctionSubclass",  # subclasses must not see how their bits are read
    "TorchDispatchMode",  # the way to see every operation; only its module is private
    "_BatchNorm",  # the base of all batch norms; there is no public one
    "_ConvNd",  # the base of all convolutions
    "_InstanceNorm",  # the base of all instance norms
    "_NormBase",  # the base of batch norm and instance norm
    "_are_functorch_transforms_active",  # vmap, grad, jvp need the differentiable formula
    "_cuda_getCurrentRawStream",  # a stream's address, without making a Stream in every call
    "_cuda_getDevice",  # the current device, without the checks of the public function
    "_get_current_function_mode_stack",  # which function modes are active
    "_get_tracing_state",  # not None while torch.jit.trace is running
    "_has_any_global_hook",  # hooks on all modules: then no module may be skipped
    "_len_torch_dispatch_stack",  # how many dispatch modes are active
    "_len_torch_function_stack",  # how many function modes are active
    "averaged_parameters",
    "forward_ad",  # public; its _current_level is 0 or more during forward-mode differentiation
]

# Only CUDA builds of torch have these two.
_cuda_getDevice = cast(Callable[[], int], getattr(torch._C, "_cuda_getDevice", None))  # noqa: N816
_cuda_getCurrentRawStream = cast(  # noqa: N816
    Callable[[int], int], getattr(torch._C, "_cuda_getCurrentRawStream", None)
)

MODULE_ATTRIBUTES = (
    "_parameters",  # the module's own parameters by name
    "_buffers",  # its own buffers by name
    "_modules",  # its children by name
    "_non_persistent_buffers_set",  # the names of buffers that are not in the state_dict
    "_forward_hooks",  # a module with hooks must be called, not skipped
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_apply",  # overridden, so that statistics stay in fp32
    "_load_from_state_dict",  # overridden, so that a checkpoint may lack num_batches_tracked
)
TENSOR_ATTRIBUTES = ("_version",)  # counts the writes in place


def averaged_parameters(ddp: DistributedDataParallel) -> set[int]:
    """Return the ``id`` of each parameter whose gradient the wrapper averages over the ranks.

    Only its reducer knows them, for requires_grad may have changed since it was made.
    """
    buckets = ddp.reducer._get_zeros_like_grad_buckets()
    return {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
