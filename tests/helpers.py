"""What many tests need: a state to compare with, bit for bit, and a training step."""

import copy
import io
import pickle

import torch


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
