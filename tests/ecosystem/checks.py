"""What a frozen model owes wherever it is taken, whoever it is that trains it."""

import contextlib

import torch

import bnfreeze
from bnfreeze import Policy, freeze, unfreeze
from tests.helpers import moved, state, statistics

__all__ = [
    "assert_frozen_as",
    "freeze_by",
    "keeps_its_promise",
    "resumed_in_a_new_model",
    "train",
]


def freeze_by(model, policy, head="fc", **options):
    """Freeze by a policy of the table; with ``weights``, all but the head."""
    rules = {"**": policy, head: "none"} if "weights" in policy else policy
    return freeze(model, rules, **options)


def assert_frozen_as(model, policy):
    """Each norm layer says that it is frozen by this policy, and does what that one promises."""
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
    """What is held must not move within, in a bit; and all that is not held must.

    Args:
        model: the frozen model itself, not what wraps it.
        policy: the one of `freeze_by`; ``"none"`` for a model that is not frozen.
        head: the name of what trains, whatever is frozen.
        apart: the last part of names that are no parameters, and of which nothing is promised.
        process_group: of the ranks that must agree.
    """
    flags = Policy.parse(policy)
    norms = {layer.name for layer in bnfreeze.inspect(model).layers}
    snapshot, before = bnfreeze.snapshot(model) if flags else None, state(model)
    yield
    if snapshot is not None:
        report = bnfreeze.verify(model, snapshot, process_group=process_group)
        assert report.ok, str(report)
    of_norms = {name for name in before if name.startswith(tuple(f"{norm}." for norm in norms))}
    held = set()
    held |= statistics(of_norms) if flags.freezes_statistics else set()
    held |= of_norms - statistics(of_norms) if flags.freezes_affine else set()
    if Policy.WEIGHTS in flags:
        held |= {name for name in before if not name.startswith(f"{head}.")}
    others = {name for name in before if name.rpartition(".")[2] in apart}
    assert moved(before, model) - others == set(before) - held - others


@contextlib.contextmanager
def resumed_in_a_new_model(model, policy):
    """A new model, thawed and of other values, to which what `model` holds must come back within.

    On leaving it must be frozen by the policy once more.
    """
    fresh = type(model)()
    freeze_by(fresh, policy)
    fresh.load_state_dict(model.state_dict())
    with keeps_its_promise(fresh, policy):
        fresh.load_state_dict(type(model)().state_dict())
        unfreeze(fresh)
        yield fresh
    assert_frozen_as(fresh, policy)


def train(model, images, steps=3, forward=None):
    """Steps as people take them, with an optimizer that has weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        (forward or model)(images).square().mean().backward()
        optimizer.step()
