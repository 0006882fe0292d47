"""What many tests need: a state to compare with, bit for bit, and a training step."""

import copy
import io
import os
import pickle
from typing import NamedTuple

import torch
from torch import Tensor

# Whether CUDA is what tests/shim/fake_gpu.py has put in its place.
FAKE = "FAKE_GPU_DEVICES" in os.environ


class Affine(NamedTuple):
    """A `bnfreeze.nn.reference.Norm` by its names: the tensors of one frozen norm layer, and its eps."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def double(self):
        """The same in fp64."""
        return Affine(*(None if t is None else t.double() for t in self[:4]), self.eps)


def bits(tensor):
    if hasattr(tensor, "to_local"):  # of what is sharded, this rank's part
        tensor = tensor.to_local()
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).clone()


def state(module):
    """Every parameter and buffer, as bytes, by name."""
    return {name: bits(value) for name, value in module.state_dict().items()}


def moved(before, module):
    """The names whose bytes differ from those of `before`."""
    after = module.state_dict()
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], bits(after[name]))}


def step(model, images, optimizer=None, **zero_grad):
    """One training step as people write it: train(), forward, backward, step."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer.zero_grad(**zero_grad)
    # Also where every parameter is held, there is something to differentiate by.
    model(images.clone().requires_grad_()).square().mean().backward()
    optimizer.step()
    return optimizer


STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def statistics(names):
    return {name for name in names if name.rpartition(".")[2] in STATISTICS}


def copied(model, how):
    """The model copied by ``"deepcopy"``, ``"pickle"`` or, whole into a file, ``"save"``."""
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
    """MiB saved for backward, each storage once, parameters and casts of them left out."""
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    # Sorted, for a linear layer saves its weight transposed.
    shapes = {(*sorted(p.shape),) for p in model.parameters() if p.dim() > 1}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and (*sorted(tensor.shape),) not in shapes:
            # Held, so that the address is not given to another.
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        out = model(image)
    assert out.requires_grad
    return sum(storage.nbytes() for storage in storages.values()) / 2**20
