"""freeze and unfreeze: what they change, what they leave, and that the way back is exact."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze import Policy, PolicyError, freeze, unfreeze
from tests.conftest import Small
from tests.helpers import copied, moved, state, statistics, step

POLICIES = [
    "stats",
    "affine",
    "eval",
    "eval+affine",
    "stats+affine",
    "eval+affine+weights",
    "fused",
    "fused+weights",
]


def norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}


def description(model):
    """All that unfreeze owes: class, flags, momentum and the like, of every module."""
    return {
        name: (
            type(module),
            module.training,
            {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None)},
            {k: p.requires_grad for k, p in module._parameters.items() if p is not None},
            set(vars(module)),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_frozen_stays_and_what_trains_moves(model, images, policy):
    flags, owners = Policy.parse(policy), norms(model)
    freeze(model, policy)
    before = state(model)
    optimizer = step(model, images, set_to_none=False)
    step(model, images, optimizer, set_to_none=False)
    changed = moved(before, model)
    stats = statistics(before)
    affine = {n for n in before if n.rpartition(".")[0] in owners} - stats
    others = set(before) - stats - affine
    assert statistics(changed) == (set() if flags.freezes_statistics else stats)
    assert changed & affine == (set() if flags.freezes_affine else affine)
    assert changed & others == (set() if Policy.WEIGHTS in flags else others)


@pytest.mark.parametrize("policy", ["eval", "eval+affine", "fused"])
def test_under_eval_train_mode_gives_eval_modes_output_bit_for_bit(model, images, policy):
    reference = copy.deepcopy(model).eval()
    freeze(model, policy)
    assert torch.equal(model.train()(images), reference(images))


def test_under_stats_train_mode_still_normalises_with_the_batch(model, images):
    reference = copy.deepcopy(model).train()
    freeze(model, "stats")
    assert torch.equal(model.train()(images), reference(images))
    assert torch.equal(model.eval()(images), copy.deepcopy(model).eval()(images))


@pytest.mark.parametrize("policy", POLICIES)
def test_modules_parameters_and_buffers_stay_the_very_objects(model, images, policy):
    def objects():
        return [
            (name, id(thing))
            for things in (model.named_modules(), model.named_parameters(), model.named_buffers())
            for name, thing in things
        ]

    before, keys = objects(), list(model.state_dict())
    freeze(model, policy)
    model.train()(images)
    assert objects() == before
    assert list(model.state_dict()) == keys
    unfreeze(model)
    assert objects() == before


@pytest.mark.parametrize("policy", POLICIES)
def test_unfreeze_gives_back_class_flags_momentum_and_requires_grad(model, policy):
    model.backbone[0][1].momentum = None
    model.stem[1].weight.requires_grad_(False)
    model.backbone.eval()
    before, values = description(model), state(model)
    freeze(model, policy)
    unfreeze(model)
    assert description(model) == before
    assert moved(values, model) == set()


@pytest.mark.parametrize(("ask", "expected"), [("train", True), ("eval", False)])
def test_the_training_flag_given_back_is_the_one_last_asked_for(model, ask, expected):
    freeze(model, "eval")
    getattr(model, ask)()
    assert not any(layer.training for layer in norms(model).values())
    freeze(model, "fused")
    unfreeze(model)
    assert all(layer.training is expected for layer in norms(model).values())


def test_a_flag_set_by_hand_does_not_thaw_and_is_given_back(model):
    freeze(model, "eval")
    for module in model.modules():
        module.training = True
    assert not any(layer.training for layer in norms(model).values())
    unfreeze(model)
    assert all(layer.training for layer in norms(model).values())


def test_the_same_policy_twice_changes_nothing(model):
    freeze(model, "eval+affine+weights")
    before = description(model)
    report = freeze(model, "eval+affine+weights")
    assert description(model) == before
    assert all(row.actions == () for row in report.layers)
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_policy_again_mends_what_was_broken_since(model):
    freeze(model, "eval+affine")
    model.stem[1].weight.requires_grad_(True)
    freeze(model, "eval+affine")
    assert not model.stem[1].weight.requires_grad


def test_another_policy_starts_from_the_original_state(model):
    before = description(model)
    freeze(model, "eval+affine+weights")
    freeze(model, "stats")
    assert all(p.requires_grad for p in norms(model)["stem.1"].parameters())
    assert norms(model)["stem.1"].training
    assert model.stem[0].weight.requires_grad
    unfreeze(model)
    assert description(model) == before


def test_layers_that_no_rule_matches_keep_what_they_have(model):
    freeze(model, {"stem": "eval"})
    report = freeze(model, {"head": "affine"})
    rows = {row.name: row for row in report.layers}
    assert rows["stem.1"].policy == "eval"
    assert rows["stem.1"].actions == ()
    assert rows["head.2"].policy == "affine"
    assert rows["backbone.0.1"].policy == "none"
    assert not model.train().stem[1].training


def test_the_last_matching_rule_wins_and_none_is_an_exception(model):
    rules = {"": "eval+affine", "backbone": "stats", "backbone.1": "none", "**.2": "affine"}
    report = freeze(model, rules)
    assert {row.name: row.policy for row in report.layers} == {
        "stem.1": "eval+affine",
        "backbone.0.1": "stats",
        "backbone.1.1": "none",
        "head.2": "affine",
    }


def test_none_leaves_a_frozen_layer_as_it_is(model):
    freeze(model, "eval")
    freeze(model, {"": "stats", "stem": "none"})
    assert not model.train().stem[1].training
    assert model.head[2].training


def test_weights_freezes_convolutions_but_not_the_exceptions(model):
    freeze(model, {"": "eval+weights", "head": "none"})
    held = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert held == {name for name, _ in model.named_parameters() if not name.startswith("head")}


def test_a_later_rule_without_weights_takes_convolutions_back_out(model):
    freeze(model, {"": "eval+weights", "backbone.1": "eval"})
    assert not model.backbone[0][0].weight.requires_grad
    assert model.backbone[1][0].weight.requires_grad
    assert model.backbone[1][1].weight.requires_grad


@pytest.mark.parametrize("policy", ["eval+affine", "eval+weights"])
def test_an_exception_may_name_a_module_without_norm_layers(model, policy):
    freeze(model, {"**": policy, "head.1": "none"})
    assert model.head[1].weight.requires_grad
    assert not model.head[2].weight.requires_grad


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"backbon": "eval"}, "matches no module. Did you mean 'backbone'"),
        ({"backbone.7": "eval"}, "matches no module"),
        ({"head.1": "eval"}, "matches 'head.1', but no norm layer"),
        ({"head.0": "eval+weights"}, "no norm layer and no parameter"),
        ({"": "eval", "heat": "none"}, "matches no module. Did you mean 'head'"),
        ({"layer1": "none"}, "matches no module"),
        ({"layer[12]": "eval"}, "Only *, ? and ** are special"),
        ({"": "eval", "Stem": "affine"}, "Did you mean 'stem'"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_that_suggests(model, rules, says):
    before = description(model)
    with pytest.raises(PolicyError) as caught:
        freeze(model, rules)
    assert says in str(caught.value)
    assert description(model) == before


def test_a_norm_layer_that_is_the_root_itself(images):
    layer = nn.BatchNorm2d(3)
    layer(images)
    report = freeze(layer, "eval+affine")
    assert [row.name for row in report.layers] == [""]
    before = state(layer)
    layer.train()(images)
    assert moved(before, layer) == set()
    assert "(the model)" in str(report)
    unfreeze(layer)
    assert type(layer) is nn.BatchNorm2d
    assert layer.training


def test_a_shared_layer_is_frozen_once_under_all_its_names(images):
    shared = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = freeze(model, {"b": "eval"})
    assert [(row.name, row.note) for row in report.layers] == [("a", "also b.0")]
    before = state(model)
    model.train()
    model["a"](images)
    assert moved(before, model) == set()
    assert model["a"] is model["b"][0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_is_frozen_too_and_unfreezes_by_itself(model, images, policy, how):
    freeze(model, policy)
    twin = copied(model, how)
    before = state(twin)
    step(twin, images)
    if Policy.parse(policy).freezes_statistics:
        assert statistics(moved(before, twin)) == set()
    unfreeze(twin)
    assert {type(layer) for layer in norms(twin).values()} == {nn.BatchNorm1d, nn.BatchNorm2d}
    # The original is not touched by what happens to the copy.
    assert all(row.policy != "none" for row in freeze(model, policy).layers)
    twin.eval()
    unfreeze(model)
    assert model.stem[1].training


def test_old_pickle_protocols_work_too(model):
    freeze(model, "eval")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert not pickle.loads(pickle.dumps(model.stem[1], protocol)).train().training


@pytest.mark.parametrize("policy", POLICIES)
def test_state_dicts_load_both_ways(model, policy):
    plain = Small()
    freeze(model, policy)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert moved(state(model), plain) == set()
    other = Small()
    model.load_state_dict(other.state_dict(), strict=True)
    assert moved(state(other), model) == set()


def test_hooks_stay(model, images):
    seen = []
    model.stem[1].register_forward_hook(lambda layer, args, output: seen.append(layer))
    freeze(model, "eval")
    model(images)
    unfreeze(model)
    model(images)
    assert seen == [model.stem[1]] * 2


def test_leaving_the_report_unfreezes(model):
    before = description(model)
    with freeze(model, "eval+affine") as report:
        assert len(report.layers) == 4
        assert not model.stem[1].training
    assert description(model) == before


def test_leaving_the_report_leaves_alone_what_was_frozen_before(model):
    freeze(model, {"stem": "eval"})
    with freeze(model, {"head": "eval"}):
        pass
    assert not model.train().stem[1].training
    assert model.head[2].training


def test_unfreeze_takes_patterns(model):
    freeze(model, "eval")
    report = unfreeze(model, select="backbone.*")
    given = {row.name for row in report.layers if row.actions == ("restore",)}
    assert given == {"backbone.0.1", "backbone.1.1"}
    assert not model.train().stem[1].training
    unfreeze(model, ["stem", "head"])
    assert all(type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d) for layer in norms(model).values())


def test_unfreezing_what_is_not_frozen_does_nothing_but_a_typo_is_an_error(model):
    report = unfreeze(model)
    assert all(row.actions == () for row in report.layers)
    with pytest.raises(PolicyError, match="Did you mean 'backbone'"):
        unfreeze(model, "backbon")


def tied(first, second):
    second.weight = first.weight
    return nn.ModuleDict({"first": first, "second": second}), first, second


def test_tied_parameters_train_again_once_no_layer_freezes_them():
    model, first, second = tied(nn.Linear(3, 3), nn.Linear(3, 3))
    freeze(model, "weights")
    unfreeze(model, "second")
    assert not first.weight.requires_grad
    assert second.bias.requires_grad
    unfreeze(model, "first")
    assert first.weight.requires_grad
    freeze(model, {"first": "weights"})
    freeze(model, {"second": "weights"})
    unfreeze(model)
    assert first.weight.requires_grad


def test_a_tied_parameter_stays_frozen_when_only_one_of_its_layers_gets_a_new_policy():
    model, first, second = tied(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    freeze(model, "eval+affine")
    freeze(model, {"second": "eval"})
    assert not first.weight.requires_grad
    assert second.bias.requires_grad


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.BatchNorm2d, "not the class BatchNorm2d"),
        (None, "Is there a return missing"),
        (nn.BatchNorm2d(3).state_dict(), "looks like a state_dict"),
        ("resnet50", "not str"),
        ([nn.BatchNorm2d(3)], "not list"),
    ],
)
def test_what_is_no_model_is_a_clear_type_error(model, says):
    # A path and a state_dict can be looked at, though not frozen.
    looks = () if isinstance(model, (str, dict)) else (bnfreeze.inspect,)
    for function in (freeze, unfreeze, *looks):
        with pytest.raises(TypeError, match=says):
            function(model)


@pytest.mark.parametrize("policy", ["eval", "weights"])
def test_a_model_with_nothing_to_freeze_is_an_error(policy):
    with pytest.raises(PolicyError, match="would freeze nothing"):
        freeze(nn.Sequential(nn.ReLU()), policy)


def test_what_is_no_optimizer_is_refused_before_anything_changes(model):
    before = description(model)
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        freeze(model, "eval", optimizer="adam")
    assert description(model) == before


def test_an_error_half_way_leaves_nothing_half_frozen(model, monkeypatch):
    model.stem[1].weight.grad = torch.ones(4)
    before = description(model)
    from bnfreeze.freezing import apply

    real, count = apply.set_record, []

    def fails(module, record):
        count.append(module)
        if len(count) == 7:
            raise RuntimeError("disk on fire")
        real(module, record)

    monkeypatch.setattr(apply, "set_record", fails)
    with pytest.raises(RuntimeError, match="disk on fire"):
        freeze(model, "eval+affine+weights")
    assert len(count) == 7
    assert description(model) == before
    assert model.stem[1].weight.grad is not None


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("eval+affine", "EvalBatchNorm2d"),
        ("stats", "FixedStatsBatchNorm2d"),
        ("affine", "FixedAffineBatchNorm2d"),
        ("fused", "FrozenBatchNorm2d"),
    ],
)
def test_a_frozen_model_prints_its_policy(model, policy, name):
    printed = repr(model)
    freeze(model, policy)
    assert f"{name}(4, eps=1e-05" in repr(model)
    assert f'frozen="{policy}")' in repr(model)
    # Tools take a class whose name ends in FrozenBatchNorm2d for another library's layer.
    assert type(model.stem[1]).__name__.endswith("FrozenBatchNorm2d") is (policy == "fused")
    unfreeze(model)
    assert repr(model) == printed


def test_two_models_do_not_know_of_each_other(model, images):
    other = Small()
    freeze(model, "eval")
    assert all(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) for m in norms(other).values())
    before = state(other)
    other.train()(images)
    assert statistics(moved(before, other)) == statistics(before)


@pytest.mark.parametrize("first", ["stats", "affine", "eval"])
@pytest.mark.parametrize("second", ["stats", "eval", "fused"])
@pytest.mark.parametrize("mode", [True, False])
def test_the_flag_last_asked_for_survives_a_change_of_policy(model, first, second, mode):
    model.train(not mode)
    freeze(model, first)
    model.train(mode)
    freeze(model, second)
    unfreeze(model)
    assert {layer.training for layer in norms(model).values()} == {mode}


def test_tied_layers_frozen_by_themselves_are_given_back_together():
    model, first, second = tied(nn.Linear(3, 3), nn.Linear(3, 3))
    freeze(first, "weights")
    freeze(second, "weights")
    unfreeze(model)
    assert first.weight.requires_grad


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_layer_fused_while_the_model_went_to_half_precision_works_when_given_back(
    model, images, half
):
    plain = copy.deepcopy(model).to(half)
    freeze(model, "fused")
    buffers = {name: id(buffer) for name, buffer in model.to(half).named_buffers()}
    unfreeze(model)
    assert torch.equal(model.eval()(images.to(half)), plain.eval()(images.to(half)))
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers


def test_a_rule_that_a_later_one_overrides_everywhere_is_an_error(model):
    with pytest.raises(PolicyError, match="last rule"):
        freeze(model, {"stem": "eval", "**": "none"})
    assert type(model.stem[1]) is nn.BatchNorm2d


def test_a_list_in_place_of_a_policy_is_answered_with_a_mapping(model):
    with pytest.raises(PolicyError, match=r"\{'layer1': 'eval'\}"):
        freeze(model, ["stem"])
