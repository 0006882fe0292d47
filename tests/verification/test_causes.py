"""The messages: where, what, since when, why, and how to mend it."""

import copy
import json

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.messages import sentence


def layer(policy=None):
    model = nn.Sequential()
    model.add_module("bn", nn.BatchNorm1d(2))
    if policy:
        bnfreeze.freeze(model, policy)
    return model


def told(model, change, *, tensors="held", optimizer=None):
    before = bnfreeze.snapshot(model, tensors=tensors, optimizer=optimizer)
    change(model)
    return bnfreeze.verify(model, before)


def ran(model):
    model.train()
    model(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))


def assign_new_statistics(model):
    model.bn.running_mean, model.bn.running_var = torch.zeros(2), torch.ones(2)
    model.bn.num_batches_tracked *= 0


def test_the_message_says_where_what_why_and_how_to_mend_it():
    report = told(layer().eval(), ran, tensors="bn.running_mean")
    assert report.message == (
        "bn.running_mean drifted: 2 of 2 elements differ, first at [0] (0 → 0.2), "
        "largest change 0.4.\n"
        "Its layer is a plain BatchNorm1d in training mode: model.train() was called after an "
        'eval() that does not last. Use freeze(model, "eval").\n'
        "And 1 more: bn (thawed)."
    )


def test_a_message_counts_what_else_drifted():
    report = told(layer(), ran, tensors="norm")
    assert report.message.endswith("\nAnd 2 more: 2 value.")


CAUSES = {
    "a layer in train mode": (
        lambda m: None,
        ran,
        "norm",
        "a plain BatchNorm1d in training mode, and ran once since",
    ),
    "a layer in eval mode that ran": (
        lambda m: None,
        lambda m: (ran(m), ran(m), m.eval()),
        "norm",
        "a plain BatchNorm1d, in eval mode now, and ran 2 times in training mode since",
    ),
    "statistics alone": (
        lambda m: None,
        ran,
        "bn.running_var",
        "in training mode, where each forward pass updates its statistics",
    ),
    "momentum 0": (
        lambda m: setattr(m.bn, "momentum", 0),
        ran,
        "norm",
        "momentum=0 does not stop the count",
    ),
    "affine only": (
        lambda m: bnfreeze.freeze(m, "affine"),
        ran,
        "bn.running_mean",
        "held by policy 'affine' alone in training mode",
    ),
    "a reset": (
        lambda m: ran(m),
        lambda m: m.bn.reset_running_stats(),
        "norm",
        "the statistics were reset",
    ),
    "new statistics, assigned": (
        lambda m: (ran(m), bnfreeze.freeze(m)),
        assign_new_statistics,
        "held",
        "Lightning's StochasticWeightAveraging does",
    ),
    "unfrozen and run": (
        lambda m: bnfreeze.freeze(m, "eval"),
        lambda m: (bnfreeze.unfreeze(m), ran(m)),
        "held",
        "was held by policy 'eval' and is a BatchNorm1d with policy 'none' now",
    ),
    "an assignment": (
        lambda m: bnfreeze.freeze(m),
        lambda m: setattr(m.bn, "running_mean", torch.ones(2)),
        "held",
        "Another tensor is registered under its name",
    ),
    "a new storage": (
        lambda m: bnfreeze.freeze(m),
        lambda m: setattr(m.bn.bias, "data", torch.ones(2)),
        "held",
        "Its storage was replaced",
    ),
    "a write to a layer in train mode that did not run": (
        lambda m: None,
        lambda m: m.bn.running_mean.add_(1),
        "norm",
        "written in place once",
    ),
    "a load": (
        lambda m: bnfreeze.freeze(m),
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        "held",
        "All 5 tensors of the snapshot were written in place: by load_state_dict()",
    ),
    "a copy": (
        lambda m: bnfreeze.freeze(m),
        lambda m: m.bn.running_mean.copy_(torch.ones(2)),
        "held",
        "written in place once, by an operation that autograd sees",
    ),
    "a write through .data": (
        lambda m: bnfreeze.freeze(m),
        lambda m: m.bn.weight.data.zero_(),
        "held",
        "written past autograd",
    ),
}


@pytest.mark.parametrize("case", CAUSES)
def test_the_cause_is_found(case):
    prepare, change, tensors, cause = CAUSES[case]
    model = layer().train()
    prepare(model)
    report = told(model, change, tensors=tensors)
    assert any(cause in drift.cause for drift in report.drifts if drift.kind == "value")


@pytest.mark.parametrize(
    ("prepare", "cause"),
    [
        (lambda p: p.requires_grad_(True), "Its requires_grad is True and stands in SGD"),
        (
            lambda p: p.requires_grad_(False),
            "has a .grad left and stands in SGD with weight_decay=0.5 and momentum=0.9",
        ),
        (
            lambda p: p.requires_grad_(False).grad.zero_(),
            "has a .grad of zeros, as zero_grad(set_to_none=False) leaves it, and stands in SGD",
        ),
    ],
)
def test_a_weight_that_the_optimizer_moved_says_why(prepare, cause):
    model = layer()
    model.bn.weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    prepare(model.bn.weight)
    report = told(model, lambda m: optimizer.step(), tensors="bn.weight", optimizer=optimizer)
    assert cause in report.drifts[0].cause


def test_a_forward_that_ran_twice_in_a_step_is_told():
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(bnfreeze.DriftError, match=r"2 forward passes in 1 step: is it run twice"):
        with bnfreeze.guard(model, tensors="norm", optimizer=optimizer):
            ran(model)
            ran(model)
            optimizer.step()


def test_where_the_cause_cannot_be_told_it_says_so():
    model = layer("eval+affine")
    before = copy.deepcopy(bnfreeze.snapshot(model))  # knows no objects
    model.bn.running_mean += 1
    (drift,) = bnfreeze.verify(model, before).drifts
    assert drift.cause == "The cause cannot be told from the two states."
    assert "trace=True" in drift.remedy


def test_figures_have_the_digits_that_tell_them_apart():
    facts = {"changed": 1, "total": 2, "first_index": (1,)}
    drift = Drift("a", "value", **facts, before=1.0, after=1.0000001192092896, max_abs=1.19e-7)
    assert "(1 → 1.00000012), largest change 1.19e-07" in sentence(drift)
    assert "(0 → -0)" in sentence(Drift("a", "value", **facts, before=0.0, after=-0.0))


def test_a_report_is_json_with_stable_keys():
    model = layer("eval")
    report = told(model, lambda m: m.bn.running_mean.fill_(float("nan")))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (data["schema"], data["ok"], data["checked"]) == (2, False, 3)
    assert data["drifts"][0] == {
        "name": "bn.running_mean",
        "kind": "value",
        "changed": 2,
        "total": 2,
        "first_index": [0],
        "before": 0.0,
        "after": "nan",
        "max_abs": None,
        "step": None,
        "since": None,
        "rank": None,
        "operation": None,
        "where": None,
        "cause": data["drifts"][0]["cause"],
        "remedy": data["drifts"][0]["remedy"],
    }


def test_a_report_prints_as_a_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = str(told(layer("eval"), lambda m: m.bn.running_mean[0].fill_(5)))
    assert "bn.running_mean  value  1 of 2 elements differs, first at [0] (0 → 5)" in text
    assert "error value  bn.running_mean" in text
    assert "1 drift in 3 tensors." in text


def test_a_clean_report_prints_as_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    report = told(layer("eval"), lambda m: None)
    assert str(report).startswith("3 tensors unchanged, bit for bit. A change undone between")
    assert report.message == "3 tensors unchanged, bit for bit."


def test_a_digest_says_what_it_shows():
    model = layer("eval")
    before = bnfreeze.snapshot(model, digest=True)
    report = bnfreeze.verify(model, before)
    assert report.ok
    assert any("equal up to a collision" in note for note in report.notes)
    model.bn.running_mean[0] = 1
    report = bnfreeze.verify(model, before)
    assert "bn.running_mean drifted: its SHA-256 is another." in report.message
    assert (report.drifts[0].changed, report.drifts[0].total) == (None, 2)


def test_a_name_is_never_printed_raw():
    model = nn.Module()
    model.register_buffer("evil\x1b[2J", torch.ones(1))
    report = told(model, lambda m: m._buffers["evil\x1b[2J"].zero_(), tensors="all")
    assert "\x1b" not in report.message
    assert "\x1b" not in str(report)


def test_a_model_of_another_architecture_is_told_so():
    before = bnfreeze.snapshot(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), tensors="all")
    other = nn.ModuleDict({"stem": nn.BatchNorm2d(4), "0": nn.Conv2d(3, 8, 1)})
    drifts = bnfreeze.verify(other, before).drifts
    strange = [d for d in drifts if d.kind in {"removed", "added", "shape", "replaced"}]
    assert strange
    assert all("another architecture" in d.cause for d in strange)


def test_another_model_of_the_same_architecture_is_told_so():
    before = bnfreeze.snapshot(nn.BatchNorm2d(4), tensors="all")
    drifts = bnfreeze.verify(nn.BatchNorm2d(4), before).drifts
    assert {d.kind for d in drifts} == {"replaced"}
    assert all("All 2 parameters are other objects" in d.cause for d in drifts)


def test_a_change_of_values_is_told_before_a_change_of_flags():
    model = nn.BatchNorm2d(4)
    before = bnfreeze.snapshot(model, tensors="all")
    model.weight.requires_grad_(False)
    with torch.no_grad():
        model.bias[1] = 5
    model.bias.requires_grad_(False)
    report = bnfreeze.verify(model, before)
    assert [(d.name, d.kind) for d in report.drifts] == [
        ("weight", "requires-grad"),
        ("bias", "value"),
        ("bias", "requires-grad"),
    ]
    assert report.message.startswith("bias drifted: 1 of 4 elements differs")
