"""The table of policies: names, flags, and what implies what."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import bnfreeze
from bnfreeze import Policy, PolicyError

NAMES = ["stats", "eval", "fused", "fused-act", "folded", "affine", "weights"]


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("eval", Policy.EVAL),
        ("affine+eval", Policy.EVAL | Policy.AFFINE),
        (" Eval + AFFINE ", Policy.EVAL | Policy.AFFINE),
        ("fused_act+weights", Policy.FUSED_ACT | Policy.WEIGHTS),
        ("none", Policy.NONE),
        (Policy.STATS, Policy.STATS),
    ],
)
def test_a_string_and_a_flag_mean_the_same(text, policy):
    assert Policy.parse(text) == policy


@given(st.lists(st.sampled_from(NAMES), min_size=1))
def test_every_combination_survives_str_parse_and_pickle(names):
    policy = Policy.parse("+".join(names))
    assert Policy.parse(str(policy)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert all(Policy.parse(name) in policy for name in names)
    # The shortest name: leave one part out, and it means something else.
    parts = str(policy).split("+")
    for part in parts:
        rest = [Policy.parse(other) for other in parts if other != part]
        assert not rest or Policy.parse("+".join(map(str, rest))) != policy


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("affine+eval", "eval+affine"),
        ("eval+affine+fused", "fused"),
        ("weights+fused-act+stats", "fused-act+weights"),
        ("weights+folded+fused", "folded+weights"),
        ("weights+affine+eval", "eval+weights"),
        ("none", "none"),
    ],
)
def test_the_name_is_the_shortest_in_one_order(text, shortest):
    assert str(Policy.parse(text)) == shortest


@pytest.mark.parametrize(
    ("text", "statistics", "affine", "eval_mode"),
    [
        ("stats", True, False, False),
        ("affine", False, True, False),
        ("eval", True, False, True),
        ("eval+affine", True, True, True),
        ("fused", True, True, True),
        ("fused-act", True, True, True),
        ("folded", True, True, True),
        ("weights", False, True, False),
        ("none", False, False, False),
    ],
)
def test_each_policy_freezes_what_the_table_says(text, statistics, affine, eval_mode):
    policy = Policy.parse(text)
    assert (Policy.STATS in policy) is policy.freezes_statistics is statistics
    assert (Policy.AFFINE in policy) is policy.freezes_affine is affine
    assert (Policy.EVAL in policy) is policy.forces_eval is eval_mode
    assert (Policy.FUSED in policy) is text.startswith(("fused", "folded"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("evall", "Did you mean 'eval'?"),
        ("eval+affin", "There is no policy 'affin'"),
        ("", "There is no policy ''"),
        ("eval+", "There is no policy ''"),
        ("none+eval", "'none' means leave alone"),
        (None, "not NoneType"),
        (["eval"], "not list"),
    ],
)
def test_a_policy_that_does_not_exist_is_named_with_those_that_do(wrong, says):
    with pytest.raises(PolicyError) as caught:
        Policy.parse(wrong)
    assert says in str(caught.value)


def parametrized():
    layer = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


@pytest.mark.parametrize(
    ("layer", "who"),
    [
        (nn.BatchNorm2d(3), None),
        (nn.BatchNorm2d(3).eval(), None),
        (nn.BatchNorm2d(3).requires_grad_(False), "requires_grad"),
        (parametrized(), None),
        (parametrized().requires_grad_(False), "requires_grad"),
        (nn.BatchNorm2d(3, affine=False), None),
        (FrozenBatchNorm2d(3), "class"),
        (bnfreeze.FrozenBatchNorm2d(3), "class"),
    ],
)
def test_who_froze_a_layer(layer, who):
    assert frozen_by(layer) == [who]


@pytest.mark.parametrize("policy", NAMES)
def test_what_freeze_froze_is_frozen_by_bnfreeze(policy):
    layer = nn.BatchNorm2d(3).requires_grad_(False)
    bnfreeze.freeze(layer, policy)
    assert frozen_by(layer) == ["bnfreeze"]
    bnfreeze.unfreeze(layer)
    assert frozen_by(layer) == ["requires_grad"]


def test_a_layer_that_shares_the_weight_of_a_frozen_one_is_frozen_by_bnfreeze_too():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    model[2].requires_grad_(False)
    bnfreeze.freeze(model, {"0": "eval+affine"})
    assert frozen_by(model) == ["bnfreeze", "bnfreeze", "requires_grad"]
    said = bnfreeze.inspect(model).layers[1]
    assert (said.policy, said.why["affine"]) == ("none", "frozen by policy eval+affine")
    assert said.updates_statistics
    bnfreeze.unfreeze(model)
    assert frozen_by(model) == [None, None, "requires_grad"]


@pytest.mark.parametrize("text", ["eval-affine", "eval, affine", "eval affine", "eval/affine"])
def test_names_joined_in_another_way_are_understood_in_the_error(text):
    with pytest.raises(PolicyError, match=r"'eval\+affine'"):
        Policy.parse(text)


def frozen_by(model):
    return [layer.frozen_by for layer in bnfreeze.inspect(model).layers]
