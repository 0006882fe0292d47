"""Helpers of many tests: the bits of a model, a training step, copies of a model."""

import copy
import io
import os
import pickle
from typing import NamedTuple

import torch
from torch import Tensor

# Whether the CUDA driver is the fake one of tests/shim/fake_gpu.py.
FAKE = "FAKE_GPU_DEVICES" in os.environ


class Affine(NamedTuple):
    """The tensors and the eps of a frozen norm layer, as `bnfreeze.nn.reference.Norm` has them."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def double(self):
        """Return the same in fp64."""
        return Affine(*(None if t is None else t.double() for t in self[:4]), self.eps)


def bits(tensor):
    """Return the bytes of a tensor."""
    if hasattr(tensor, "to_local"):  # of a sharded tensor, the part of this rank
        tensor = tensor.to_local()
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).clone()


def state(module):
    """Return the bytes of every tensor in the state_dict, by name."""
    return {name: bits(value) for name, value in module.state_dict().items()}


def moved(before, module):
    """Return the names of the tensors whose bytes differ from those in `before`."""
    after = module.state_dict()
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], bits(after[name]))}


def step(model, images, optimizer=None, **zero_grad):
    """Take a training step as people write it: train(), forward, backward, step."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer.zero_grad(**zero_grad)
    # The images require grad, so that backward works even if every parameter is frozen.
    model(images.clone().requires_grad_()).square().mean().backward()
    optimizer.step()
    return optimizer


STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def statistics(names):
    """Return those names that are running statistics or counters of batches."""
    return {name for name in names if name.rpartition(".")[2] in STATISTICS}


def copied(model, how):
    """Copy the model with ``"deepcopy"``, ``"pickle"`` or, with ``torch.save``, ``"save"``."""
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    assert how == "save"
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def saved_mib(model, image, autocast):
    """Return the MiB saved for backward: each storage once, without parameters and their casts."""
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    # Sorted, because a linear layer saves its weight transposed.
    shapes = {(*sorted(p.shape),) for p in model.parameters() if p.dim() > 1}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and (*sorted(tensor.shape),) not in shapes:
            # Kept alive, so that no other storage gets this address.
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        out = model(image)
    assert out.requires_grad
    return sum(storage.nbytes() for storage in storages.values()) / 2**20
