"""inspect on a live model: what it says is what then happens."""

import json

import pytest
import torch
from torch import nn

from bnfreeze import freeze, inspect
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
    from bnfreeze import unfreeze

    unfreeze(model)
    assert [m.training for m in model.modules()] == flags


def test_each_answer_has_its_reason(model):
    model.stem[1].weight.requires_grad_(False)
    freeze(model, {"head": "eval+affine"})
    optimizer = torch.optim.SGD([*model.stem.parameters(), *model.head.parameters()], lr=0.1)
    layers = {layer.name: layer.why for layer in inspect(model, optimizer=optimizer).layers}
    assert layers["stem.1"]["affine"] == "bias: requires_grad, in the optimizer"
    assert layers["stem.1"]["statistics"] == "train mode"
    assert layers["backbone.0.1"]["affine"] == "in no optimizer"
    assert layers["head.2"]["affine"] == "held by policy eval+affine"
    assert layers["head.2"]["normalizes_with"] == "held by policy eval+affine"


def test_several_optimizers_are_taken_together(model):
    first = torch.optim.SGD(model.stem.parameters(), lr=0.1)
    second = torch.optim.Adam(model.head.parameters())
    trains = {x.name: x.trains_affine for x in inspect(model, optimizer=[first, second]).layers}
    assert trains == {"stem.1": True, "backbone.0.1": False, "backbone.1.1": False, "head.2": True}


def test_a_model_in_eval_is_taken_to_be_trained_next(model):
    model.eval()
    assert all(layer.normalizes_with == "batch" for layer in inspect(model).layers)
    assert "eval-not-lasting" not in {f.code for f in inspect(model).findings}


def test_a_model_without_norm_layers_is_said_to_have_none():
    said = inspect(nn.Linear(2, 2))
    assert said.layers == ()
    assert said.ok
    assert [f.code for f in said.findings] == ["no-norm-layer"]
    assert "no norm layer" in str(said)


def test_the_dict_is_plain_json_with_stable_keys(model):
    freeze(model, {"stem": "eval"})
    data = json.loads(json.dumps(inspect(model).to_dict()))
    assert list(data) == ["schema", "ok", "layers", "findings"]
    assert data["layers"][0] == {
        "name": "stem.1",
        "kind": "BatchNorm2d",
        "policy": "eval",
        "normalizes_with": "running",
        "updates_statistics": False,
        "trains_affine": True,
        "num_features": 4,
        "eps": 1e-5,
        "why": {
            "normalizes_with": "held by policy eval",
            "statistics": "held by policy eval",
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
        "actions": ["force-eval", "freeze-statistics", "freeze-weight", "freeze-bias"],
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


def test_a_flag_set_again_on_what_is_held_is_told(model):
    freeze(model, "eval+affine")
    model.requires_grad_(True)
    found = {f.layer: f.message for f in inspect(model).findings if f.code == "held-trains"}
    assert len(found) == 4
    assert "weight and bias have requires_grad=True again" in found["stem.1"]


def test_a_model_in_which_nothing_is_left_to_train_is_told(model):
    report = freeze(model, "eval+weights")
    assert [f.layer for f in report.findings if f.code == "nothing-trains"] == [""]
    freeze(model, "eval+affine")
    assert "nothing-trains" not in {f.code for f in inspect(model).findings}


def test_errors_come_first(model):
    model.head[2].running_var[0] = -1
    model.stem[1].reset_running_stats()
    levels = [finding.level for finding in inspect(model).findings]
    assert levels == ["error", "warning"]


def test_a_new_model_is_all_never_trained():
    findings = inspect(Small()).findings
    assert [f.code for f in findings] == ["never-trained"] * 4
