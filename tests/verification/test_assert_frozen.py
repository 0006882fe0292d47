"""assert_frozen: the state of a model, and its bits."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import bnfreeze


def net():
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.add_module("head", nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    return model


class Foreign(nn.Module):
    def forward(self, x):
        return x


def frozen(policy="eval+affine"):
    model = net()
    bnfreeze.freeze(model, policy)
    return model


def failing(model, **options):
    """The names of the layers that are reported; empty if it passes."""
    try:
        bnfreeze.assert_frozen(model, **options)
    except bnfreeze.NotFrozenError as error:
        return {name for name, why in error.layers if why}
    return set()


@pytest.mark.parametrize("policy", ["eval", "affine", "stats", "eval+affine", "fused+weights"])
def test_a_frozen_model_passes(policy):
    model = frozen(policy)
    bnfreeze.assert_frozen(model)
    bnfreeze.assert_frozen(model.train())
    bnfreeze.assert_frozen(copy.deepcopy(model))


def test_a_layer_that_is_not_frozen_fails_unless_it_was_left_out_on_purpose():
    assert failing(net()) == {"body.1", "head.1"}
    assert failing(net().eval()) == {"body.1", "head.1"}
    partly = frozen({"body": "eval"})
    assert failing(partly) == {"head.1"}
    assert failing(partly, select="body") == set()
    assert failing(partly, select=["body", "head"]) == {"head.1"}
    on_purpose = frozen({"": "eval", "head": "none"})
    assert failing(on_purpose) == set()
    assert failing(pickle.loads(pickle.dumps(on_purpose))) == set()
    bnfreeze.freeze(on_purpose, "eval")  # another rule, and the rule "none" is forgotten
    bnfreeze.unfreeze(on_purpose, "head")
    assert failing(on_purpose) == {"head.1"}


@pytest.mark.parametrize(
    ("policy", "layer", "change"),
    [
        ("eval+affine", 1, lambda bn: bn.weight.requires_grad_()),
        ("eval+affine", 1, lambda bn: setattr(bn.bias, "grad", torch.ones(4))),
        ("eval+affine", 1, lambda bn: setattr(bn, "__class__", nn.BatchNorm2d)),
        ("eval+weights", 0, lambda conv: conv.bias.requires_grad_()),
    ],
)
def test_a_promise_that_is_not_kept_is_named(policy, layer, change):
    model = frozen(policy)
    change(model.body[layer])
    assert failing(model) == {f"body.{layer}"}


def test_a_train_of_the_models_own_that_thaws_a_layer_is_called_first():
    model = frozen({"body": "eval+weights", "head": "eval"})
    assert failing(model) == set()
    thaws = type("Thaws", (type(model),), {"train": lambda self, mode=True: _thaw(self, mode)})
    model.__class__ = thaws
    assert failing(model) == {"body.0", "body.1"}
    assert "take that out of it" in remedy(model)
    assert not model.body[1].weight.requires_grad


def _thaw(model, mode):
    nn.Module.train(model, mode)
    return model.requires_grad_(mode)


def test_a_layer_that_was_frozen_says_what_is_frozen_still():
    model = frozen({"body": "eval+affine", "head": "affine"}).requires_grad_(True)
    with pytest.raises(bnfreeze.NotFrozenError, match="again") as caught:
        bnfreeze.assert_frozen(model)
    why = dict(caught.value.layers)
    assert all("weight and bias require grad" in text for text in why.values())
    assert ["statistics are frozen" in why[name] for name in ("body.1", "head.1")] == [True, False]
    bnfreeze.freeze(model, {"body": "eval+affine", "head": "affine"})
    assert failing(model, select="body") == set()
    with pytest.raises(bnfreeze.NotFrozenError) as caught:
        bnfreeze.assert_frozen(net())
    assert "again" not in str(caught.value)


def remedy(model, **options):
    with pytest.raises(bnfreeze.NotFrozenError) as caught:
        bnfreeze.assert_frozen(model, **options)
    return str(caught.value).splitlines()[-1]


def test_the_remedy_is_one_that_freeze_does_not_refuse():
    model = frozen()
    nn.utils.parametrize.register_parametrization(model.body[1], "weight", nn.Identity())
    with pytest.raises(bnfreeze.PolicyError) as refused:
        bnfreeze.freeze(model)
    assert str(refused.value) in remedy(model)
    nn.utils.parametrize.remove_parametrizations(model.body[1], "weight")
    model.body[1].weight.requires_grad_()
    assert "again" in remedy(model)
    bnfreeze.freeze(model)
    assert failing(model) == set()
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    assert "run one forward pass first" in remedy(lazy)
    assert 'freeze(model, "eval+affine")' in remedy(frozen("eval"), strict=True)
    foreign = Foreign()
    foreign.register_buffer("running_var", torch.ones(4))
    assert "freeze(model, {'own': 'eval'})" in remedy(nn.ModuleDict({"own": foreign}))


def test_strict_demands_running_statistics_and_nothing_that_trains():
    assert failing(frozen("eval+affine"), strict=True) == set()
    assert failing(frozen("fused"), strict=True) == set()
    for policy in ("eval", "stats+affine", "stats"):
        assert failing(frozen(policy), strict=True) == {"body.1", "head.1"}


def test_nothing_to_check_is_an_error():
    with pytest.raises(bnfreeze.PolicyError):
        bnfreeze.assert_frozen(nn.Linear(2, 2))
    with pytest.raises(bnfreeze.PolicyError, match="nowhere"):
        bnfreeze.assert_frozen(frozen(), select="nowhere")


def test_a_look_alike_is_frozen_and_a_foreign_norm_layer_is_not():
    bnfreeze.assert_frozen(nn.Sequential(FrozenBatchNorm2d(4)))
    foreign = nn.Module()
    foreign.register_buffer("running_var", torch.ones(4))
    model = nn.ModuleDict({"known": FrozenBatchNorm2d(4), "foreign": foreign})
    assert failing(model) == {"foreign"}


def test_with_a_snapshot_the_bits_are_compared_too():
    model = frozen()
    before = bnfreeze.snapshot(model)
    bnfreeze.assert_frozen(model, before)
    model.body[1].running_mean += 1
    bnfreeze.assert_frozen(model)
    with pytest.raises(bnfreeze.DriftError) as caught:
        bnfreeze.assert_frozen(model, before)
    assert [drift.name for drift in caught.value.report.drifts] == ["body.1.running_mean"]
    with pytest.raises(TypeError, match="Snapshot"):
        bnfreeze.assert_frozen(model, "before")


def test_the_error_is_an_assertion_and_pickles():
    with pytest.raises(AssertionError) as caught:
        bnfreeze.assert_frozen(net())
    assert isinstance(caught.value, bnfreeze.BnfreezeError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.layers) == (str(caught.value), caught.value.layers)
