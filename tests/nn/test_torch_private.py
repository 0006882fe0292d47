"""torch's private names exist, and do what bnfreeze takes them to do."""

import torch
import torch.distributed as dist
from torch import nn

from bnfreeze import torch_private as private


def test_they_say_what_observes_operations():
    def active():
        return (
            private._are_functorch_transforms_active(),
            private._get_tracing_state() is not None,
            private._len_torch_dispatch_stack() > 0,
            private._len_torch_function_stack() > 0,
            private.forward_ad._current_level >= 0,
        )

    assert not any(active())
    seen = {}
    torch.func.vmap(lambda x: seen.update(vmap=active()) or x)(torch.ones(2))
    torch.jit.trace(
        lambda x: seen.update(trace=active()) or x + 1, torch.ones(2), check_trace=False
    )
    with private.TorchDispatchMode():
        seen["dispatch"] = active()
    with torch.overrides.BaseTorchFunctionMode():
        seen["function"] = active()
    with torch.autograd.forward_ad.dual_level():
        seen["forward"] = active()
    for place, (name, answers) in enumerate(seen.items()):
        assert answers[place], name
    with torch.device("cpu"):
        (mode,) = private._get_current_function_mode_stack()
    assert type(mode) is private.DeviceContext


def test_the_bases_are_those_of_torchs_layers():
    assert issubclass(nn.BatchNorm1d, private._BatchNorm)
    assert issubclass(nn.SyncBatchNorm, private._BatchNorm)
    assert issubclass(nn.InstanceNorm3d, private._InstanceNorm)
    assert issubclass(private._BatchNorm, private._NormBase)
    assert issubclass(private._InstanceNorm, private._NormBase)
    assert issubclass(nn.ConvTranspose2d, private._ConvNd)


def test_global_hooks_are_seen():
    assert not private._has_any_global_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert private._has_any_global_hook()
    finally:
        handle.remove()


def test_a_subclass_does_not_see_what_is_read_of_it():
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args, **kwargs):
            raise AssertionError

    own = torch.ones(2).as_subclass(Own)
    with private.DisableTorchFunctionSubclass():
        assert own.sum() == 2


def test_modules_and_tensors_have_the_attributes():
    module, tensor = nn.BatchNorm1d(2), torch.ones(2)
    assert all(hasattr(module, name) for name in private.MODULE_ATTRIBUTES)
    assert all(hasattr(tensor, name) for name in private.TENSOR_ATTRIBUTES)
    assert list(module._parameters) == ["weight", "bias"]
    assert list(module._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    before = tensor._version
    tensor.add_(1)
    assert tensor._version > before


def test_cuda_builds_have_the_names_of_the_launcher():
    there = torch.backends.cuda.is_built()
    assert callable(private._cuda_getDevice) == there
    assert callable(private._cuda_getCurrentRawStream) == there


def test_a_wrapper_says_whose_gradients_it_averages():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert private.averaged_parameters(wrapped) == {id(model.weight)}
    finally:
        dist.destroy_process_group()
