"""What people do to freeze batch norm and what goes wrong; each trap with what bnfreeze owes.

The first part takes the five recipes that are copied from forums. Each is shown to fail, `inspect`
to say so beforehand, and `freeze` to do what the recipe was meant to.
"""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bnfreeze import DriftError, freeze, guard, inspect, unfreeze
from tests.conftest import Small
from tests.helpers import moved, state, statistics, step


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def codes(model, **kwargs):
    return {finding.code for finding in inspect(model, **kwargs).findings}


# The recipes.


def buffers_without_grad(model):
    for layer in norms(model):
        layer.running_mean.requires_grad = False
        layer.running_var.requires_grad = False
        layer.num_batches_tracked.requires_grad = False


def affine_without_grad(model):
    buffers_without_grad(model)
    for layer in norms(model):
        layer.requires_grad_(False)


def tracking_off(model):
    for layer in norms(model):
        layer.track_running_stats = False


def momentum_zero(model):
    for layer in norms(model):
        layer.momentum = 0.0
        layer.requires_grad_(False)


def eval_once(model):
    for layer in norms(model):
        layer.eval()


@pytest.mark.parametrize(
    ("recipe", "drifts", "code"),
    [
        # What a forward pass writes is in no autograd graph; nothing can be seen of this recipe.
        (buffers_without_grad, {"running_mean", "running_var", "num_batches_tracked"}, None),
        (
            affine_without_grad,
            {"running_mean", "running_var", "num_batches_tracked"},
            "stats-not-frozen",
        ),
        (tracking_off, set(), "batch-stats-in-train"),
        (momentum_zero, {"num_batches_tracked"}, "batch-stats-in-train"),
        (
            eval_once,
            {"running_mean", "running_var", "num_batches_tracked"},
            "train-undoes-eval",
        ),
    ],
)
def test_a_popular_recipe_does_not_freeze_and_inspect_says_so(model, images, recipe, drifts, code):
    recipe(model)
    said = inspect(model)
    before = state(model)
    reference = copy.deepcopy(model).eval()(images)
    step(model, images)
    assert {name.rpartition(".")[2] for name in statistics(moved(before, model))} == drifts
    assert not torch.equal(copy.deepcopy(model).train()(images), reference)
    for layer in said.layers:
        assert layer.normalizes_with == "batch"
        assert layer.updates_statistics is bool(drifts)
    assert code is None or code in {finding.code for finding in said.findings}


@pytest.mark.parametrize(
    "recipe",
    [buffers_without_grad, affine_without_grad, tracking_off, momentum_zero, eval_once],
)
def test_freezing_does_what_the_recipe_was_meant_to(model, images, recipe):
    recipe(model)
    reference = copy.deepcopy(model)
    for layer in norms(reference):
        layer.track_running_stats = True
    expected = reference.eval()(images)
    freeze(model, "eval+affine")
    before = state(model)
    assert torch.equal(model.train()(images), expected)
    step(model, images)
    assert not {n for n in moved(before, model) if n.rpartition(".")[0] in {"stem.1", "head.2"}}
    for layer in inspect(model).layers:
        assert layer.normalizes_with == "running"
        assert not layer.updates_statistics
        assert not layer.trains_affine


def test_an_optimizer_without_the_backbone_does_not_freeze_its_statistics(model, images):
    optimizer = torch.optim.SGD(model.head[1].parameters(), lr=0.1)
    said = inspect(model, optimizer=optimizer)
    before = state(model)
    step(model, images, optimizer)
    assert statistics(moved(before, model)) == statistics(before)
    assert all(layer.updates_statistics and not layer.trains_affine for layer in said.layers)
    assert {f.name for f in said.findings if f.code == "stats-not-frozen"} == {
        layer.name for layer in said.layers
    }


def test_statistics_turned_off_at_construction_leave_eval_with_the_batch():
    layer = nn.BatchNorm2d(3, track_running_stats=False).eval()
    x = torch.randn(4, 3, 5, 5) * 3 + 2
    assert layer(x).mean().abs() < 1e-3, "it normalised with the batch, in eval mode"
    (facts,) = inspect(layer).layers
    assert facts.normalizes_with == "batch"
    assert codes(layer) == {"stats-missing"}


# Around train() and eval().


def test_tools_that_restore_the_mode_from_the_root_do_not_thaw(model, images):
    freeze(model, "eval")
    before = state(model)
    was = model.training  # as torch.onnx's older exporter and torchinfo's summary do
    model.eval()
    model.train(was)
    model.train()
    model(images)
    model.requires_grad_(True).apply(lambda module: module.train())
    model(images)
    assert statistics(moved(before, model)) == set()


def test_a_deepcopy_answers_for_itself(model):
    freeze(model, "eval")
    twin = copy.deepcopy(model)
    unfreeze(model)
    twin.train()
    assert not twin.stem[1].training
    assert model.stem[1].training


def test_inspect_asks_a_model_that_overrides_train_and_leaves_no_trace(images):
    class NormEval(Small):
        # As mmdetection's norm_eval backbones: the mode is set again after every train().
        def train(self, mode=True):
            super().train(mode)
            for layer in norms(self.backbone):
                layer.eval()
            if mode:
                self.stem.requires_grad_(False)
            return self

    model = NormEval().eval()
    said = {layer.name: layer.normalizes_with for layer in inspect(model).layers}
    assert said == {
        "stem.1": "batch",
        "backbone.0.1": "running",
        "backbone.1.1": "running",
        "head.2": "batch",
    }
    assert not model.training
    assert not model.stem[1].training
    assert all(p.requires_grad for p in model.parameters())
    # Weight and bias of its backbone still train: the policies are separate, and named.
    assert {layer.name for layer in inspect(model).layers if not layer.trains_affine} == {"stem.1"}
    assert inspect(model).layers[0].frozen_by == "requires_grad"


# Gradients and optimizers.


def optimizers(parameters):
    parameters = list(parameters)
    return [
        torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
        torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True),
        torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, foreach=True),
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9),
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_stale_gradient_does_not_move_a_frozen_weight(model, images, index):
    optimizer = optimizers(model.parameters())[index]
    step(model, images, optimizer)  # gradients, and momentum in the optimizer's state
    plain = copy.deepcopy(model)
    plain_optimizer = optimizers(plain.parameters())[index]
    step(plain, images, plain_optimizer)
    plain.stem[1].requires_grad_(False)
    before = state(plain)
    assert "affine-grad-left" in codes(plain, optimizer=plain_optimizer)
    assert inspect(plain).layers[0].trains_affine
    plain_optimizer.step()
    assert "stem.1.weight" in moved(before, plain), "the trap: requires_grad=False, and it moved"

    report = freeze(model, "eval+affine", optimizer=optimizer)
    assert "clear-grad" in report.layers[0].actions
    before = state(model)
    optimizer.step()
    for set_to_none in (False, True):
        step(model, images, optimizer, set_to_none=set_to_none)
    assert not {n for n in moved(before, model) if n.startswith(("stem.1.", "head.2."))}


def test_frozen_parameters_in_the_optimizer_are_listed(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = freeze(model, {"stem": "eval+affine"}, optimizer=optimizer)
    listed = [f for f in report.findings if f.code == "optimizer-has-frozen"]
    assert [(f.name, f.level) for f in listed] == [("stem.1", "note")]
    assert "weight and bias" in listed[0].message
    again = freeze(model, {"stem": "eval+affine"}, optimizer=(one for one in [optimizer]))
    assert [f for f in again.findings if f.code == "optimizer-has-frozen"] == listed
    assert "optimizer-has-frozen" not in codes(
        model, optimizer=torch.optim.SGD(model.head.parameters())
    )


class Muon(torch.optim.Optimizer):
    """As KellerJordan's: what has no gradient gets one of zeros, and decays."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.mul_(1 - 0.1 * 0.1).add_(parameter.grad, alpha=-0.1)


def test_of_an_optimizer_that_decays_what_has_no_gradient_nothing_false_is_said(model, images):
    optimizer = Muon(model.parameters())
    report = freeze(model, "eval+affine", optimizer=optimizer)
    (listed, *_) = [f for f in report.findings if f.code == "optimizer-has-frozen"]
    assert "optimizer Muon" in listed.message
    assert "harmless" not in listed.message
    with pytest.raises(DriftError) as caught, guard(model, optimizer=optimizer):
        step(model, images, optimizer)
    drift = caught.value.report.drifts[0]
    assert (drift.name, drift.cause_code) == ("stem.1.weight", "leftover-grad")
    assert "the optimizer (Muon)" in drift.cause
    assert "leave the parameter out of the optimizer" in drift.remedy
    freeze(model, "eval+affine", optimizer=optimizer)
    optimizer = Muon([p for p in model.parameters() if p.requires_grad])
    with guard(model, optimizer=optimizer):
        step(model, images, optimizer)


def test_lbfgs_moves_a_frozen_weight_without_a_gradient_and_the_report_warns_of_it(model, images):
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = model.train()(images).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = freeze(model, "eval+affine", optimizer=optimizer)
    assert {f.level for f in report.findings if f.code == "optimizer-has-frozen"} == {"warning"}
    before = state(model)
    optimizer.step(closure)
    assert "stem.1.weight" in moved(before, model), "the trap is real"
    remedy = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=4)
    before, optimizer = state(model), remedy
    optimizer.step(closure)
    assert "stem.1.weight" not in moved(before, model)
    assert "stem.0.weight" in moved(before, model)


def test_optimizer_state_still_loads_because_parameters_stay_parameters(model, images):
    optimizer = step(model, images)
    saved = copy.deepcopy(optimizer.state_dict())
    freeze(model, "eval+affine")
    again = torch.optim.AdamW(model.parameters())
    again.load_state_dict(saved)
    assert len(again.state_dict()["state"]) == len(saved["state"])


# Tools that walk over norm layers.


def test_update_bn_leaves_frozen_layers_alone(model, images):
    freeze(model, "eval")
    before = state(model)
    update_bn([images], model)
    assert moved(before, model) == set()
    assert not model.train().stem[1].training
    assert model.stem[1].momentum == 0.1


def test_reset_running_stats_and_reset_parameters_leave_what_is_frozen(model):
    freeze(model, "eval")
    before = state(model)
    model.stem[1].reset_running_stats()
    assert moved(before, model) == set()
    model.stem[1].reset_parameters()
    assert moved(before, model) == {"stem.1.weight", "stem.1.bias"}
    freeze(model, "affine")
    before = state(model)
    model.stem[1].reset_parameters()
    assert statistics(moved(before, model)) == moved(before, model) != set()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode_do_not_stop_updates_and_freezing_does(model, images, mode):
    before = state(model)
    with mode():
        model.train()(images)
    assert statistics(moved(before, model)) == statistics(before)
    freeze(model, "eval")
    before = state(model)
    with mode():
        model.train()(images)
    assert moved(before, model) == set()


def test_replacing_a_frozen_layer_is_seen_by_inspect(model):
    freeze(model, "eval")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert {layer.policy for layer in inspect(converted).layers} == {"none"}
    assert all(layer.updates_statistics for layer in inspect(converted).layers)


# Values.


def test_eps_is_kept():
    layer = nn.BatchNorm2d(3, eps=1e-3)
    layer.running_var.fill_(1e-6)
    x = torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(layer).eval()(x)
    freeze(layer, "eval")
    assert torch.equal(layer.train()(x), expected)
    assert inspect(layer).layers[0].eps == 1e-3


@pytest.mark.parametrize(
    ("spoil", "code", "level"),
    [
        (lambda layer: layer.reset_running_stats(), "never-trained", "warning"),
        (lambda layer: layer.running_var[0].fill_(-0.5), "stats-var-nonpositive", "error"),
        (lambda layer: layer.running_var[0].zero_(), "stats-var-nonpositive", "warning"),
        (lambda layer: layer.running_mean[1].fill_(float("nan")), "stats-nonfinite", "error"),
        (lambda layer: layer.running_var[1].fill_(float("inf")), "stats-nonfinite", "error"),
        (lambda layer: setattr(layer, "eps", 0.0), "layer-eps-zero", "warning"),
        (lambda layer: layer.half(), "stats-dtype", "warning"),
        (lambda layer: layer.bfloat16(), "stats-dtype", "warning"),
    ],
)
def test_statistics_that_a_person_should_know_of_are_findings(model, spoil, code, level):
    assert codes(model) == set()
    spoil(model.stem[1])
    for findings in (inspect(model).findings, freeze(model, "eval").findings):
        found = [f for f in findings if f.code == code]
        assert [(f.name, f.level) for f in found] == [("stem.1", level)]
    assert inspect(model).ok is (level != "error")


def test_statistics_are_never_rewritten(model):
    model.stem[1].running_var[0] = -0.5
    before = state(model)
    freeze(model, "eval+affine")
    unfreeze(model)
    assert moved(before, model) == set()


def test_the_chosen_policy_stats_has_a_note_and_lightnings_way_a_warning(model):
    freeze(model, {"stem": "stats"})
    model.head[2].track_running_stats = False
    levels = {f.name: f.level for f in inspect(model).findings if f.code == "batch-stats-in-train"}
    assert levels == {"stem.1": "note", "head.2": "warning"}
