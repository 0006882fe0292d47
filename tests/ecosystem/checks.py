"""What a frozen model must do in every training loop."""

import contextlib

import pytest
import torch

import bnfreeze
from bnfreeze import Policy, freeze, unfreeze
from tests.helpers import moved, state, statistics

__all__ = [
    "POLICIES",
    "assert_frozen_as",
    "by_policy",
    "freeze_by",
    "keeps_its_promise",
    "resumed_in_a_new_model",
    "train",
]

# The three ways in which a layer is changed: another forward that still uses the batch; a forward
# with the running statistics; and a new class of layer, with blocks that fuse what follows it.
POLICIES = ("stats", "eval+affine", "fused-act")
by_policy = pytest.mark.parametrize("policy", POLICIES)


def freeze_by(model, policy, head="fc", **options):
    """Freeze by a policy; one with ``weights`` does not apply to the head."""
    rules = {"**": policy, head: "none"} if "weights" in policy else policy
    return freeze(model, rules, **options)


def assert_frozen_as(model, policy):
    """Each norm layer reports this policy, and will behave as the policy says."""
    flags = Policy.parse(policy)
    layers = bnfreeze.inspect(model).layers
    assert layers
    for layer in layers:
        assert layer.policy == policy, layer.name
        assert layer.updates_statistics is not flags.freezes_statistics, layer.name
        assert (layer.normalizes_with == "running") is flags.forces_eval, layer.name
        assert layer.trains_affine is not flags.freezes_affine, layer.name


@contextlib.contextmanager
def keeps_its_promise(model, policy, head="fc", apart=(), process_group=None):
    """Within the block every frozen tensor must keep its bits, and every other one must change.

    Args:
        model: the frozen model itself, not a wrapper around it.
        policy: the one that was given to `freeze_by`; ``"none"`` for a model that is not frozen.
        head: the name of the part that trains under every policy.
        apart: last parts of the names of buffers that are not checked.
        process_group: the ranks that must agree.
    """
    flags = Policy.parse(policy)
    norms = {layer.name for layer in bnfreeze.inspect(model).layers}
    snapshot, before = bnfreeze.snapshot(model) if flags else None, state(model)
    yield
    if snapshot is not None:
        report = bnfreeze.verify(model, snapshot, process_group=process_group)
        assert report.ok, str(report)
    of_norms = {name for name in before if name.startswith(tuple(f"{norm}." for norm in norms))}
    frozen = set()
    frozen |= statistics(of_norms) if flags.freezes_statistics else set()
    frozen |= of_norms - statistics(of_norms) if flags.freezes_affine else set()
    if Policy.WEIGHTS in flags:
        frozen |= {name for name in before if not name.startswith(f"{head}.")}
    unchecked = {name for name in before if name.rpartition(".")[2] in apart}
    assert moved(before, model) - unchecked == set(before) - frozen - unchecked


@contextlib.contextmanager
def resumed_in_a_new_model(model, policy):
    """Give a new model with other values; within the block it must get those of ``model``.

    At the end of the block it must be frozen by the policy.
    """
    fresh = type(model)()
    freeze_by(fresh, policy)
    fresh.load_state_dict(model.state_dict())
    with keeps_its_promise(fresh, policy):
        fresh.load_state_dict(type(model)().state_dict())
        unfreeze(fresh)
        yield fresh
    assert_frozen_as(fresh, policy)


def train(model, images, steps=2, forward=None):
    """Take training steps, with an optimizer that has weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        (forward or model)(images).square().mean().backward()
        optimizer.step()
