"""The report of freezing agrees with `inspect`, and counts right; a dry run gives the same."""

import copy

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model
from timm.layers import freeze_batch_norm_2d as timm_freeze
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from bnfreeze import FreezeReport, PolicyError, freeze, inspect, unfreeze
from tests.conftest import Small
from tests.freezing.test_foreign import OwnNorm, Renormalised
from tests.helpers import state, step

POLICIES = ["stats", "affine", "eval", "stats+affine", "eval+affine", "fused", "fused-act"]
POLICIES += ["weights", "eval+weights", {"": "eval", "**.1": "none"}, {"stem.*": "eval+affine"}]


def by_hand(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
    return model


def left_gradients(model):
    step(model, torch.randn(4, 3, 10, 10))
    by_hand(model)
    return model


def bias_alone(model):
    model.stem[1].bias.requires_grad_(False)
    return model


def tracking_off(model):
    model.stem[1].track_running_stats = False
    return model


def momentum_zero(model):
    model.stem[1].momentum = 0.0
    return model


def pruned(model):
    prune.random_unstructured(model.stem[1], "weight", 0.5)
    return model


FLAGS = {
    "as built": lambda model: model,
    "eval": lambda model: model.eval(),
    "frozen by hand": by_hand,
    "bias by hand": bias_alone,
    "gradients left": left_gradients,
    "tracking off": tracking_off,
    "momentum 0": momentum_zero,
    "no statistics": lambda m: m.stem.append(nn.BatchNorm2d(4, track_running_stats=False)) and m,
    "no affine": lambda m: m.stem.append(nn.BatchNorm2d(4, affine=False)) and m,
    "instance norm": lambda m: m.stem.append(nn.InstanceNorm2d(4, track_running_stats=True)) and m,
    "look-alike": lambda m: m.stem.append(FrozenBatchNorm2d(4)) and m,
    "timm's": lambda m: m.stem.append(timm_freeze(timm.layers.BatchNormAct2d(4))) and m,
    "pruned": pruned,
    "foreign": lambda model: model.stem.append(OwnNorm()) and model,
    "own forward": lambda model: model.stem.append(Renormalised(3)) and model,
    "split": lambda model: convert_splitbn_model(model, 2),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_the_report_never_contradicts_inspect(flags):
    for policy in POLICIES:
        for head_alone in (False, True):
            model = FLAGS[flags](Small())
            parameters = list((model.head if head_alone else model).parameters())
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            try:
                report = freeze(model, policy, optimizer=optimizer)
            except PolicyError:
                continue  # a layer without statistics, or with a computed weight
            check(report, inspect(model, optimizer=optimizer))
            check(unfreeze(model), inspect(model))


def check(report, inspection):
    rows = report.sheet().rows
    assert [row[0] for row in rows] == [facts.name for facts in inspection.layers]
    for row, facts in zip(rows, inspection.layers, strict=True):
        _, kind, policy, _, uses, statistics, affine, _ = row
        assert (kind, policy, uses) == (facts.kind, facts.policy, facts.normalizes_with)
        assert (statistics == "update") is facts.updates_statistics
        assert (affine == "train") is facts.trains_affine


def test_a_weight_frozen_by_hand_is_named_in_its_row(model):
    by_hand(model.stem)
    model.head[2].bias.requires_grad_(False)
    rows = {row.name: row for row in freeze(model, "eval").layers}
    assert rows["stem.1"].note == "weight and bias frozen by you (requires_grad=False)"
    assert rows["head.2"].note == "bias frozen by you (requires_grad=False)"
    assert rows["backbone.0.1"].note == ""
    rows = {row.name: row for row in freeze(model, "eval+affine").layers}
    assert {row.note for row in rows.values()} == {""}, "now the policy says so"


@pytest.mark.parametrize(
    ("policy", "statistics", "affine"),
    [("weights", 0, 4), ("affine", 0, 4), ("eval", 4, 0), ("fused+weights", 4, 4)],
)
def test_frozen_statistics_and_frozen_weights_are_counted_apart(model, policy, statistics, affine):
    verdict = freeze(model, policy).sheet().verdict
    assert verdict.startswith(f"Statistics frozen: {statistics} of")
    assert f"bias frozen: {affine}." in verdict
    assert ("other modules frozen: 4" in verdict) is ("weights" in policy)


def test_the_repr_of_a_report_is_short():
    report = freeze(resnet18(), "eval+affine")
    assert len(repr(report)) < 400
    assert "20 norm layers" in repr(report)
    assert report.to_dict()["schema"] == 2


def test_the_words_of_the_actions(model, images):
    step(model, images)
    report = freeze(model, {"": "eval+affine", "stem": "fused"})
    actions = {row.name: row.actions for row in report.layers}
    frozen = ("force-eval", "freeze-statistics", "freeze-weight", "freeze-bias")
    assert actions["head.2"] == (*frozen, "clear-grad")
    assert actions["stem.1"] == ("fuse", *frozen, "clear-grad")
    again = freeze(model, {"head": "stats"}).layers[-1]
    assert again.actions == ("restore", "freeze-statistics")
    assert unfreeze(model).layers[-1].actions == ("restore",)
    look_alike = FrozenBatchNorm2d(3)
    policies = ("fused", "eval", "eval")
    found = [freeze(look_alike, policy).layers[0].actions for policy in policies]
    assert found == [("fuse",), ("restore",), ()]


# Dry runs.


def everything(model):
    """All that freezing may touch, by identity where that matters."""
    found = {}
    for name, module in model.named_modules():
        found[name] = type(module), dict(module.__dict__), module.training
        for key, p in module._parameters.items():
            found[name, key] = None if p is None else (id(p), p.requires_grad, id(p.grad), p.dtype)
        for key, b in module._buffers.items():
            found[name, key] = None if b is None else (id(b), b.dtype, b.data_ptr())
    return found


@pytest.mark.parametrize("before", ["none", "eval", "fused-act"])
def test_a_dry_run_reports_what_a_real_call_does_and_changes_nothing(model, images, before):
    optimizer = step(model, images)
    freeze(model, before) if before != "none" else None
    model.bfloat16()  # a fused layer that is restored would cast its statistics
    for policy in POLICIES:
        was, values = everything(model), state(model)
        report = freeze(model, policy, optimizer=optimizer, dry_run=True)
        assert everything(model) == was
        assert state(model).keys() == values.keys()
        assert all(torch.equal(state(model)[name], value) for name, value in values.items())
        twin, twins = copy.deepcopy((model, optimizer))
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        real = freeze(twin, policy, optimizer=twins)
        assert isinstance(report, FreezeReport)
        assert report.to_dict() == real.to_dict()
        assert report.sheet().rows == real.sheet().rows


def test_a_dry_run_knows_what_is_fused():
    model = resnet18()
    dry = freeze(model, "fused-act", dry_run=True)
    assert [row.fuses for row in dry.layers] == [
        row.fuses for row in freeze(model, "fused-act").layers
    ]
    assert any(row.fuses == "add+relu" for row in dry.layers)
    assert {row.fuses for row in dry.layers if "downsample" in row.name} == {"fused"}


def test_a_dry_run_raises_what_a_real_call_raises_and_its_exit_undoes_nothing(model):
    freeze(model, {"stem": "eval"})
    with pytest.raises(PolicyError, match="Did you mean"):
        freeze(model, {"stm": "eval"}, dry_run=True)
    with freeze(model, "fused", dry_run=True) as report:
        assert report.layers[0].policy == "fused"
    assert [layer.policy for layer in inspect(model).layers] == ["eval", "none", "none", "none"]


# Findings that a report shows.


def test_an_optimizer_without_the_models_parameters_is_a_finding(model):
    def found(model, optimizer):
        reports = freeze(model, "eval", optimizer=optimizer), inspect(model, optimizer=optimizer)
        return [
            [f.level for f in report.findings if f.code == "optimizer-without-parameters"]
            for report in reports
        ]

    stranger = torch.optim.SGD(Small().parameters(), lr=0.1)
    assert found(model, stranger) == [["warning"], ["warning"]]
    assert found(model, torch.optim.SGD(model.head.parameters(), lr=0.1)) == [[], []]
    assert found(model, None) == [[], []]


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.RMSNorm(3), nn.InstanceNorm1d(3)]
)
def test_a_model_whose_norms_keep_no_statistics_is_told_to_use_weights(layer):
    with pytest.raises(PolicyError, match=rf"{type(layer).__name__}.*no running stat.*'weights'"):
        freeze(nn.Sequential(nn.Linear(3, 3), layer), {"**": "eval", "0": "none"})


def test_weight_and_bias_that_a_layer_does_not_have_are_not_counted_as_frozen():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3))
    report = freeze(model, "eval+affine")
    assert [row[6] for row in report.sheet().rows] == ["none", "frozen"]
    assert "Weight and bias frozen: 1." in str(report)
    assert "none" in inspect(model).sheet().rows[0]
