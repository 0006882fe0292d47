import pytest

from bnfreeze import Policy, PolicyError


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("eval", Policy.EVAL),
        ("eval+affine", Policy.EVAL | Policy.AFFINE),
        ("affine+eval", Policy.EVAL | Policy.AFFINE),
        (" Eval + AFFINE ", Policy.EVAL | Policy.AFFINE),
        ("fused-act", Policy.FUSED_ACT),
        ("fused_act+weights", Policy.FUSED_ACT | Policy.WEIGHTS),
        ("none", Policy.NONE),
        (Policy.STATS, Policy.STATS),
    ],
)
def test_a_string_and_a_flag_mean_the_same(text, policy):
    assert Policy.parse(text) == policy
    assert Policy.parse(str(policy)) == policy


def test_the_name_of_a_combination_has_one_order():
    assert str(Policy.AFFINE | Policy.EVAL) == "eval+affine"
    assert str(Policy.NONE) == "none"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("evall", "Did you mean 'eval'?"),
        ("eval+affin", "there is no policy 'affin'"),
        ("", "there is no policy ''"),
        ("eval+", "there is no policy ''"),
        ("none+eval", "'none' means leave alone"),
        (None, "not NoneType"),
        (3, "not int"),
        (["eval"], "not list"),
    ],
)
def test_a_policy_that_does_not_exist_is_named_with_those_that_do(wrong, says):
    with pytest.raises(PolicyError) as caught:
        Policy.parse(wrong)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "statistics", "affine", "eval_mode"),
    [
        ("stats", True, False, False),
        ("affine", False, True, False),
        ("eval", True, False, True),
        ("eval+affine", True, True, True),
        ("fused", True, True, True),
        ("fused-act", True, True, True),
        ("weights", False, True, False),
        ("none", False, False, False),
    ],
)
def test_each_policy_holds_what_the_table_says(text, statistics, affine, eval_mode):
    policy = Policy.parse(text)
    assert policy.freezes_statistics is statistics
    assert policy.freezes_affine is affine
    assert policy.forces_eval is eval_mode
