"""inspect on a live model: what it says is what then happens."""

import json
import math

import pytest
import torch
import torchvision
from torch import nn

from bnfreeze import (
    FrozenBatchNorm2d,
    NotFrozenError,
    assert_frozen,
    freeze,
    inspect,
    probe,
    unfreeze,
)
from tests.conftest import Small
from tests.helpers import moved, state, statistics, step


@pytest.mark.parametrize("policy", ["none", "stats", "affine", "eval", "eval+affine"])
def test_what_inspect_says_is_what_the_next_step_does(model, images, policy):
    if policy != "none":
        freeze(model, {"stem": policy, "head": policy})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    said = inspect(model, optimizer=optimizer)
    before = state(model)
    step(model, images, optimizer)
    changed = moved(before, model)
    for layer in said.layers:
        mine = {name for name in changed if name.startswith(f"{layer.name}.")}
        assert layer.updates_statistics is bool(statistics(mine))
        assert layer.trains_affine is bool(mine - statistics(mine))


def test_looking_changes_nothing(model):
    model.backbone.eval()
    before, flags = state(model), [m.training for m in model.modules()]
    freeze(model, {"stem": "eval"})
    inspect(model)
    assert moved(before, model) == set()
    assert [m.training for m in model.modules()][4:] == flags[4:]
    unfreeze(model)
    assert [m.training for m in model.modules()] == flags


def test_each_answer_has_its_reason_and_says_who_froze_the_layer(model):
    model.stem[1].weight.requires_grad_(False)
    freeze(model, {"head": "eval+affine"})
    optimizer = torch.optim.SGD([*model.stem.parameters(), *model.head.parameters()], lr=0.1)
    said = inspect(model, optimizer=optimizer)
    layers = {layer.name: layer.why for layer in said.layers}
    assert layers["stem.1"]["affine"] == "bias: requires_grad, in the optimizer"
    assert layers["stem.1"]["statistics"] == "train mode"
    assert layers["backbone.0.1"]["affine"] == "in no optimizer"
    assert layers["head.2"]["affine"] == "frozen by policy eval+affine"
    assert layers["head.2"]["normalizes_with"] == "frozen by policy eval+affine"
    model.stem[1].bias.requires_grad_(False)
    model.backbone[0][1] = FrozenBatchNorm2d(6)
    assert {layer.name: layer.frozen_by for layer in inspect(model).layers} == {
        "stem.1": "requires_grad",
        "backbone.0.1": "class",
        "backbone.1.1": None,
        "head.2": "bnfreeze",
    }


def test_several_optimizers_are_taken_together(model):
    first = torch.optim.SGD(model.stem.parameters(), lr=0.1)
    second = torch.optim.Adam(model.head.parameters())
    trains = {x.name: x.trains_affine for x in inspect(model, optimizer=[first, second]).layers}
    assert trains == {"stem.1": True, "backbone.0.1": False, "backbone.1.1": False, "head.2": True}


def test_a_model_in_eval_is_taken_to_be_trained_next(model):
    model.eval()
    assert all(layer.normalizes_with == "batch" for layer in inspect(model).layers)
    assert "train-undoes-eval" not in {f.code for f in inspect(model).findings}


def test_a_model_without_norm_layers_is_said_to_have_none():
    said = inspect(nn.Linear(2, 2))
    assert said.layers == ()
    assert said
    assert [f.code for f in said.findings] == ["model-no-norm-layer"]
    assert str(said).endswith("No norm layer.")


def test_the_dict_is_plain_json_with_stable_keys(model):
    freeze(model, {"stem": "eval", "head": "stats"})
    data = json.loads(json.dumps(inspect(model).to_dict()))
    assert list(data) == ["schema", "ok", "layers", "findings"]
    assert data["schema"] == 2
    assert list(data["findings"][0]) == ["level", "code", "name", "message", "remedy", "key"]
    assert data["layers"][0] == {
        "name": "stem.1",
        "kind": "BatchNorm2d",
        "policy": "eval",
        "normalizes_with": "running",
        "updates_statistics": False,
        "trains_affine": True,
        "frozen_by": "bnfreeze",
        "num_features": 4,
        "eps": 1e-5,
        "why": {
            "normalizes_with": "frozen by policy eval",
            "statistics": "frozen by policy eval",
            "affine": "requires_grad",
        },
        "aliases": [],
    }
    report = json.loads(json.dumps(freeze(model, {"head": "eval+affine"}).to_dict()))
    assert report["layers"][-1] == {
        "name": "head.2",
        "kind": "BatchNorm1d",
        "policy": "eval+affine",
        "fuses": "",
        "actions": [
            "restore",
            "force-eval",
            "freeze-statistics",
            "freeze-weight",
            "freeze-bias",
        ],
        "note": "",
    }


def test_a_train_of_the_users_own_that_does_more_is_not_run_where_it_need_not_be(model, images):
    class Lora(nn.Linear):
        # Merges and unmerges, as such layers do.
        def train(self, mode=True):
            self.weight.data += 1
            return super().train(mode)

    model.head[1] = Lora(6 * 8 * 8, 5)
    before = state(model)
    freeze(model, "eval+affine")
    inspect(model)
    assert moved(before, model) == set()
    assert "train" not in vars(model.head[1])


@pytest.mark.parametrize("mode", [True, False])
def test_what_a_train_of_the_models_own_switches_is_switched_back(mode, images):
    class Switching(Small):
        # As torchvision's feature extractors, which have a graph for each mode; and it writes.
        graph = "train"

        def train(self, mode=True):
            if mode is not self.training:
                self.graph = "train" if mode else "eval"
                self.head[1].weight.data.mul_(1.1 if mode else 1 / 1.1)
            return super().train(mode)

    model = Switching().train(mode)
    before, graph = state(model), model.graph
    freeze(model, "eval+affine")
    inspect(model)
    probe(model, [images])
    assert model.graph == graph
    assert moved(before, model) == set()


def test_a_train_that_raises_leaves_no_trace(model):
    class Refuses(Small):
        def train(self, mode=True):
            super().train(mode)
            raise RuntimeError("not now")

    refuses = Refuses()
    refuses.stem[1].__dict__["training"] = False
    report = freeze(refuses, {"head": "eval"})
    assert {row.policy for row in report.layers} == {"none", "eval"}
    assert not refuses.stem[1].training


def test_a_frozen_parameter_that_requires_grad_again_is_a_finding(model):
    freeze(model, "eval+affine")
    model.requires_grad_(True)
    found = [f.name for f in inspect(model).findings if f.code == "affine-thawed"]
    assert found == ["stem.1", "backbone.0.1", "backbone.1.1", "head.2"]


def test_frozen_weights_that_are_not_of_a_norm_layer_are_looked_at_too(model):
    optimizer = torch.optim.LBFGS(model.parameters())
    report = freeze(model, {"head.1": "weights"}, optimizer=optimizer)
    found = [(f.name, f.level) for f in report.findings if f.code == "optimizer-has-frozen"]
    assert found == [("head.1", "warning")]
    model.head[1].weight.requires_grad_(True)
    assert [f.name for f in inspect(model).findings if f.code == "affine-thawed"] == ["head.1"]


def test_a_leftover_gradient_in_no_optimizer_is_no_finding(model, images):
    model(images).sum().backward()
    frozen = [model.stem[1].weight, model.stem[1].bias]
    for parameter in frozen:
        parameter.requires_grad_(False)
    assert "affine-grad-left" in codes(model)
    assert "affine-grad-left" in codes(model, optimizer=torch.optim.SGD(frozen))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert "affine-grad-left" not in codes(model, optimizer=torch.optim.SGD(trained))


def test_a_model_in_which_nothing_is_left_to_train_is_a_finding(model):
    report = freeze(model, "eval+weights")
    assert [f.name for f in report.findings if f.code == "model-nothing-trains"] == [""]
    freeze(model, "eval+affine")
    assert "model-nothing-trains" not in {f.code for f in inspect(model).findings}


def test_errors_come_first(model):
    model.head[2].running_var[0] = -1
    model.stem[1].reset_running_stats()
    said = inspect(model)
    assert [finding.level for finding in said.findings] == ["error", "warning"]
    assert not said


def test_values_of_a_new_layer_are_a_finding_whether_batches_were_counted_or_not(model):
    assert [f.code for f in inspect(Small()).findings] == ["never-trained"] * 4
    model.stem[1].running_mean.zero_()
    model.stem[1].running_var.fill_(1)
    for what in (model, model.state_dict()):
        assert [(f.code, f.name, f.level) for f in inspect(what).findings] == [
            ("stats-not-updated", "stem.1", "warning")
        ]
    model.stem[1].running_mean[0] = 1e-30
    assert inspect(model).findings == ()


def test_a_layer_that_was_trained_with_no_statistics_of_its_own_is_not_called_new():
    # Detectron's weights have the statistics folded into weight and bias; 0 and 1 are left.
    frozen, live = FrozenBatchNorm2d(8), nn.BatchNorm2d(8)
    for layer, level in ((frozen, "note"), (live, "warning")):
        if layer is frozen:
            del layer.num_batches_tracked  # the frozen layers of other libraries keep none
        for what in (layer, layer.state_dict()):
            (found,) = (f for f in inspect(what).findings if f.code == "never-trained")
            assert found.level == "warning"
        with torch.no_grad():
            layer.weight.uniform_(0.5, 1)
        for what in (layer, layer.state_dict()):
            (found,) = (f for f in inspect(what).findings if f.code == "never-trained")
            assert found.level == level
            assert "folded" in found.message
            assert "recalibrate" in found.remedy
            assert inspect(what).ok


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_new_frozen_layer_of_detectron2_is_called_new(eps):
    layer = FrozenBatchNorm2d(8, eps)
    layer.running_var -= eps
    assert [f.code for f in inspect(layer).findings] == ["never-trained"]
    layer.running_var -= 0.01
    assert inspect(layer).findings == ()


def test_an_optimizer_of_another_model_is_a_finding(model):
    other = torch.optim.SGD(Small().parameters(), lr=0.1)
    assert "optimizer-without-parameters" in codes(model, optimizer=other)
    own = torch.optim.SGD(model.head.parameters(), lr=0.1)
    assert "optimizer-without-parameters" not in codes(model, optimizer=[other, own])


def test_a_checkpoint_of_unpaired_statistics_never_says_that_there_are_none():
    said = inspect({"bn.running_mean": torch.zeros(3)})
    assert [f.code for f in said.findings] == ["stats-unpaired"]
    assert said.layers == ()
    assert "No norm layer" not in str(said)
    assert [f.code for f in inspect({"fc.weight": torch.zeros(3)}).findings] == [
        "model-no-norm-layer"
    ]


def test_a_name_that_begins_with_a_dot_hides_no_other():
    own = {"running_mean": torch.zeros(2), "running_var": torch.full((2,), 2.0)}
    other = {".running_mean": torch.full((2,), math.nan), ".running_var": own["running_var"]}
    said = inspect(own | other)
    assert [layer.name for layer in said.layers] == ["", "."]
    assert not said.ok


def test_rows_and_findings_of_a_checkpoint_carry_its_key(model):
    model.head[2].running_var[0] = -1
    said = inspect({"ema": {"model": model.state_dict()}})
    assert {layer.key for layer in said.layers} == {said.origin.key}
    assert [(f.key, f.name) for f in said.findings] == [(said.origin.key, "head.2")]
    assert said.origin.key


def codes(model, **options):
    return {finding.code for finding in inspect(model, **options).findings}


def test_a_checkpoint_that_lost_its_statistics_says_which_layers_it_may_be():
    affine = {f"{name}.{part}": torch.ones(4) for name in "ab" for part in ("weight", "bias")}
    said = inspect(affine | {"fc.weight": torch.ones(2, 4), "fc.bias": torch.ones(2)})
    assert [f.code for f in said.findings] == ["model-no-norm-layer"]
    assert "2 modules (a, b)" in said.findings[0].message
    assert "there is no batch norm" not in said.findings[0].message


def test_a_checkpoint_with_statistics_of_another_kind_is_not_said_to_have_no_norm_layer():
    said = inspect({"bn.running_mean_0": torch.zeros(4), "bn.running_var_0": torch.ones(4)})
    assert [(f.code, f.name) for f in said.findings] == [("layer-foreign", "bn")]


def test_of_statistics_that_weight_and_bias_include_it_is_not_said_that_nothing_was_trained():
    layer = torchvision.ops.FrozenBatchNorm2d(4)
    assert [(f.code, f.level) for f in inspect(layer).findings] == [("never-trained", "warning")]
    layer.bias.normal_()
    stored = [f for f in inspect(layer.state_dict()).findings if f.code == "never-trained"]
    for found in (*inspect(layer).findings, *stored):
        assert (found.code, found.level) == ("never-trained", "note")
        assert "folded into weight and bias" in found.message
    live = nn.BatchNorm2d(4)
    nn.init.normal_(live.bias)
    (found,) = inspect(live).findings
    assert (found.code, found.level) == ("never-trained", "warning")
    assert "folded into weight and bias" in found.message


@pytest.mark.parametrize("count", [3.0, 2.5, 0.3])
def test_a_count_that_was_averaged_is_a_count(count):
    norm = nn.BatchNorm2d(4)
    norm.num_batches_tracked = torch.tensor(count)
    for what in (norm, norm.state_dict()):
        assert [f.code for f in inspect(what).findings] == ["stats-not-updated"]


def test_a_file_of_what_trains_is_said_to_lack_frozen_weights():
    """Only buffers and what trains were saved: DeepSpeed#3953, torch's ignore_frozen_params."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    for norm in (model[0], model[2]):
        norm.num_batches_tracked += 3
    freeze(model, {"0": "fused"})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: v for name, v in model.state_dict().items() if name not in frozen}
    assert frozen == {"0.weight", "0.bias"}
    assert "1 of 2 lack weight or bias" in str(inspect(trained))
    assert "lack" not in str(inspect(model.state_dict()))


def test_statistics_without_values_are_said():
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(4))
    assert [(f.code, f.name) for f in inspect(model).findings] == [("stats-unread", "0")]


@pytest.mark.parametrize("policy", ["stats", "eval", "eval+affine", "fused"])
def test_a_frozen_layer_whose_statistics_another_layer_updates_is_not_frozen(policy):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].running_mean = model[0].running_mean
    report = freeze(model, {"0": policy})
    assert ("stats-shared", "0") in {(f.code, f.name) for f in report.findings}
    before = model[0].running_mean.clone()
    said = inspect(model).layers
    model.train()(torch.randn(2, 4, 3, 3) + 1)
    assert [layer.updates_statistics for layer in said] == [True, True]
    assert not torch.equal(model[0].running_mean, before)
    with pytest.raises(NotFrozenError, match="Freeze both layers"):
        assert_frozen(model, select="0")
    freeze(model, policy)
    assert_frozen(model)
    assert "stats-shared" not in {f.code for f in inspect(model).findings}
