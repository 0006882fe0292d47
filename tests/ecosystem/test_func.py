"""torch.func, torch.fx and torch.jit."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.testing import assert_close

from bnfreeze import Policy, PolicyError
from tests.helpers import moved, state

from .checks import assert_frozen_as, by_policy, freeze_by, keeps_its_promise, train


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@by_policy
def test_a_functional_call_trains_what_is_not_frozen(model, images, policy):
    freeze_by(model, policy)
    with keeps_its_promise(model, policy):
        train(model, images, forward=lambda x: functional_call(model, tensors(model), (x,)))
    assert_frozen_as(model, policy)


@by_policy
def test_gradients_are_those_of_autograd(model, images, policy):
    freeze_by(model, policy)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    twin = copy.deepcopy(model)
    twin(images).square().mean().backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}

    def loss(parameters):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return functional_call(model, {**parameters, **buffers}, (images,)).square().mean()

    assert_close(grad(loss)(trained), expected)


@by_policy
def test_an_ensemble_trains_in_one_call(model, images, policy):
    models = []
    for _ in range(3):
        one = copy.deepcopy(model)
        with torch.no_grad():
            one.conv1.weight.add_(torch.randn_like(one.conv1.weight))
        freeze_by(one, policy)
        models.append(one.train())
    parameters, buffers = stack_module_state(models)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    base = copy.deepcopy(models[0]).to("meta")
    out = vmap(lambda p, b: functional_call(base, (p, b), (images,)))(parameters, buffers)
    changed = {name for name in before if not torch.equal(before[name], buffers[name])}
    assert changed == (set() if Policy.parse(policy).freezes_statistics else set(buffers))
    assert_close(out, torch.stack([one(images) for one in models]))


@by_policy
def test_a_traced_graph_trains_and_is_frozen(model, images, policy):
    freeze_by(model, policy)
    expected = copy.deepcopy(model).train()(images)
    graph = torch.fx.symbolic_trace(model)
    assert_close(graph.train()(images), expected)
    with keeps_its_promise(graph, policy):
        train(graph, images)
    assert_frozen_as(graph, policy)
    assert_frozen_as(model, policy)


@by_policy
def test_a_graph_module_is_frozen_as_any_other(model, images, policy):
    graph = torch.fx.symbolic_trace(model)
    freeze_by(graph, policy)
    with keeps_its_promise(graph, policy):
        train(graph, images)
    assert_frozen_as(graph, policy)


@by_policy
def test_a_trace_computes_the_same(model, images, policy):
    freeze_by(model, policy)
    expected = model.eval()(images)
    traced = torch.jit.trace(model, images)
    assert_close(traced(images), expected)
    model.train()
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)


@by_policy
def test_a_script_computes_the_same_or_is_refused(model, images, policy):
    freeze_by(model, policy)
    before, modules = state(model), list(model.modules())
    expected = model.eval()(images)
    if "fused" in policy:
        with pytest.raises(PolicyError, match=r"torch\.jit\.trace"):
            torch.jit.script(model)
        assert list(model.modules()) == modules
    else:
        assert_close(torch.jit.script(model)(images), expected)
    assert moved(before, model) == set()
    assert_frozen_as(model, policy)


def test_freezing_a_scripted_model_is_refused(model):
    scripted = torch.jit.script(model)
    with pytest.raises(TypeError, match="freeze the original"):
        freeze_by(scripted, "eval")
