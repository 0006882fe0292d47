"""Causes and reports: where, what, since when, why, and how to mend it."""

import copy
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze.checkpoints import open_checkpoint
from bnfreeze.inspection.origin import Found
from bnfreeze.verification.causes import _REASONS
from bnfreeze.verification.drift import Drift, Kind, sentence
from bnfreeze.verification.stored import verify_found

PAGE = Path(bnfreeze.__file__).with_name("causes.md")


def layer(policy=None):
    model = nn.Sequential()
    model.add_module("bn", nn.BatchNorm1d(2))
    if policy:
        bnfreeze.freeze(model, policy)
    return model


def report_of(model, change, *, tensors="frozen", optimizer=None):
    before = bnfreeze.snapshot(model, tensors=tensors, optimizer=optimizer)
    change(model)
    return bnfreeze.verify(model, before)


def ran(model):
    model.train()
    model(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))


def assign_new_statistics(model):
    model.bn.running_mean, model.bn.running_var = torch.zeros(2), torch.ones(2)
    model.bn.num_batches_tracked *= 0


def average(model):
    """A step of an EMA of the model with itself."""
    for tensor in model.bn.running_mean, model.bn.running_var:
        tensor.copy_(0.9998 * tensor + (1 - 0.9998) * tensor)


def nothing(model):
    pass


def frozen_(policy="eval+affine"):
    return lambda model: bnfreeze.freeze(model, policy)


def assign(name):
    return lambda model: setattr(model.bn, name, torch.ones(2))


def ran_and_frozen(model):
    ran(model)
    bnfreeze.freeze(model)


def new_storage(model):
    model.bn.bias.data = torch.ones(2)


def load_others(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def load_longer_trained(model):
    """All tensors are written, and the count rises, but no forward runs."""
    model.load_state_dict({name: value + 9 for name, value in model.state_dict().items()})


# What is done before the snapshot, what after it, the tensors, and the code of the cause.
CAUSES = {
    "a layer in train mode": (nothing, ran, "norm", "forward-in-training"),
    "in eval mode": (nothing, lambda m: (ran(m), m.eval()), "norm", "forward-in-training"),
    "statistics alone": (nothing, ran, "bn.running_var", "forward-in-training"),
    "affine only": (frozen_("affine"), ran, "bn.running_mean", "forward-in-training"),
    "a reset": (ran, lambda m: m.bn.reset_running_stats(), "norm", "reset"),
    "an assigned reset": (ran_and_frozen, assign_new_statistics, "frozen", "reset"),
    "unfrozen": (frozen_("eval"), lambda m: (bnfreeze.unfreeze(m), ran(m)), "norm", "thawed"),
    "an assignment": (frozen_(), assign("running_mean"), "frozen", "other-tensor"),
    "a new storage": (frozen_(), new_storage, "frozen", "other-storage"),
    "no forward": (nothing, lambda m: m.bn.running_mean.add_(1), "norm", "in-place"),
    "a load": (frozen_(), load_others, "frozen", "loaded"),
    "a load of counts": (nothing, load_longer_trained, "norm", "loaded"),
    "a copy": (frozen_(), lambda m: m.bn.running_mean.copy_(torch.ones(2)), "frozen", "in-place"),
    "through .data": (frozen_(), lambda m: m.bn.weight.data.zero_(), "frozen", "hidden-write"),
}


def test_the_causes_are_read_from_their_page():
    rows = re.findall(r"^\| `([\w-]+)` \|", PAGE.read_text("utf-8"), re.M)
    assert rows == list(_REASONS)
    kinds = {kind for kind in get_args(Kind) if kind not in {"value", "mode"}}
    assert kinds | {code for *_, code in CAUSES.values()} <= {*rows}


@pytest.mark.parametrize("case", CAUSES)
def test_the_cause_is_found_and_two_snapshots_give_the_same(case):
    prepare, change, tensors, code = CAUSES[case]
    model = layer().train()
    prepare(model)
    before = bnfreeze.snapshot(model, tensors=tensors)
    change(model)
    report = bnfreeze.verify(model, before)
    assert code in {drift.cause_code for drift in report.drifts if drift.kind == "value"}
    assert bnfreeze.snapshot(model, tensors=tensors).compared_to(before).drifts == report.drifts


def wide(model):
    torch.manual_seed(0)
    model.bn = nn.BatchNorm1d(64)
    model.bn.running_mean.copy_(torch.randn(64))
    model.bn.running_var.copy_(torch.rand(64) + 0.5)
    bnfreeze.freeze(model)


def stored_report(model, change, tmp_path, *, tensors="frozen"):
    """What the command says of the model's checkpoint."""
    bnfreeze.snapshot(model, tensors=tensors).save(tmp_path / "before")
    change(model)
    torch.save(model.state_dict(), tmp_path / "end.pt")
    with open_checkpoint(tmp_path / "end.pt") as checkpoint:
        found = Found(checkpoint.chosen(None), checkpoint)
        return verify_found(found, bnfreeze.Snapshot.load(tmp_path / "before"))


@pytest.mark.parametrize(
    ("policy", "remedy"),
    [
        ("affine", "Use 'eval+affine' in place of 'affine'."),
        ("eval+affine", 'Use freeze(model, "eval+affine").'),
    ],
)
def test_the_remedy_for_a_checkpoint_keeps_the_policy_of_the_snapshot(policy, remedy, tmp_path):
    def run(model):
        bnfreeze.unfreeze(model)
        ran(model)

    drifts = stored_report(layer(policy), run, tmp_path, tensors="norm").drifts
    assert {drift.remedy for drift in drifts} == {remedy}


def test_averaged_statistics_did_not_run_in_training_mode_although_counts_were_added():
    model = layer()
    wide(model)
    model.bn.num_batches_tracked.fill_(3)
    start = model.state_dict()
    end = {name: sum([value] * 5) for name, value in start.items()}  # as ESPnet adds up integers
    end |= {name: value / 5 for name, value in end.items() if value.is_floating_point()}

    def causes():
        return {one.name: one.cause_code for one in bnfreeze.diff(start, end).tensors}

    assert causes()["bn.running_mean"] == causes()["bn.num_batches_tracked"] == "averaging"
    end["bn.running_var"] = end["bn.running_var"] + 0.1  # no rounding
    assert causes()["bn.num_batches_tracked"] == "forward-in-training"


def test_a_count_that_a_script_averaged_was_not_converted_by_half(tmp_path):
    model = layer("eval+affine")
    bnfreeze.snapshot(model).save(tmp_path / "before")
    start = model.state_dict()
    torch.save({name: sum([value] * 4) / 4 for name, value in start.items()}, tmp_path / "end.pt")
    with open_checkpoint(tmp_path / "end.pt") as checkpoint:
        found = Found(checkpoint.chosen(None), checkpoint)
        (drift,) = verify_found(found, bnfreeze.Snapshot.load(tmp_path / "before")).drifts
    assert (drift.name, drift.kind) == ("bn.num_batches_tracked", "dtype")
    assert "averaged" in drift.cause
    assert "Copy integers" in drift.remedy
    halved = bnfreeze.diff(start, {name: value.half() for name, value in start.items()}).tensors
    causes = {one.name: one.cause for one in halved if one.kind == "dtype"}
    assert "averaged" in causes.pop("bn.num_batches_tracked")
    assert len(causes) == 4
    assert all("model.half()" in cause and "averaged" not in cause for cause in causes.values())


@pytest.mark.parametrize("policy", ["eval", "stats", "fused"])
@pytest.mark.parametrize("other", [lambda: nn.Identity(), lambda: nn.GroupNorm(1, 2)])
def test_layers_that_were_replaced_may_be_the_cause_of_missing_names(policy, other):
    drifts = report_of(layer(policy), lambda m: setattr(m, "bn", other())).drifts
    (cause,) = {drift.cause for drift in drifts if drift.kind == "removed"}
    assert "its layers were replaced" in cause


@pytest.mark.parametrize(
    ("prepare", "change", "code", "count"),
    [(wide, average, "averaging", 2), (nothing, ran, "forward-in-training", 3)],
)
def test_files_and_live_models_give_the_same_cause(prepare, change, code, count, tmp_path):
    model = layer().train()
    prepare(model)
    before = bnfreeze.snapshot(model, tensors="norm")
    before.save(tmp_path / "before")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    change(model)
    torch.save(model.state_dict(), tmp_path / "end.pt")
    with open_checkpoint(tmp_path / "end.pt") as checkpoint:
        found = Found(checkpoint.chosen(None), checkpoint)
        stored = verify_found(found, bnfreeze.Snapshot.load(tmp_path / "before"))
    live = bnfreeze.verify(model, before)
    files = [c for c in bnfreeze.diff(start, tmp_path / "end.pt").tensors if c.kind != "identical"]
    for drifts in (live.drifts, stored.drifts, files):
        assert [drift.cause_code for drift in drifts] == [code] * count


@pytest.mark.parametrize(
    ("prepare", "code"),
    [
        (lambda p: p.requires_grad_(True), "trained"),
        (lambda p: p.requires_grad_(False), "leftover-grad"),
        (lambda p: p.requires_grad_(False).grad.zero_(), "leftover-grad"),
    ],
)
def test_a_weight_that_the_optimizer_moved_says_why(prepare, code):
    model = layer()
    model.bn.weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    prepare(model.bn.weight)
    report = report_of(model, lambda m: optimizer.step(), tensors="bn.weight", optimizer=optimizer)
    assert report.drifts[0].cause_code == code
    assert "SGD" in report.drifts[0].cause


@pytest.mark.parametrize("policy", ["eval+affine", "fused", "eval+weights"])
def test_a_weight_that_was_thawed_is_not_to_be_frozen_by_another_policy(policy):
    model = layer(policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_(True)
    model.bn.weight.grad = torch.ones(2)
    drift = report_of(model, lambda m: optimizer.step(), optimizer=optimizer).drifts[0]
    assert (drift.name, drift.cause_code) == ("bn.weight", "affine-thawed")
    assert f"Policy '{policy}' froze it" in drift.cause
    assert "with the same policy" in drift.remedy


@pytest.mark.parametrize("policy", ["affine", "weights"])
def test_to_freeze_the_statistics_too_the_policy_is_not_given_up(policy):
    model = layer(policy)
    drift = report_of(model, ran, tensors="norm").drifts[0]
    assert (drift.cause_code, drift.remedy) == (
        "forward-in-training",
        f"Use 'eval+{policy}' in place of '{policy}'.",
    )
    (found,) = (f for f in bnfreeze.inspect(model).findings if f.code == "stats-not-frozen")
    assert f"'eval+{policy}' in place of '{policy}'" in found.remedy
    assert bnfreeze.freeze(model, f"eval+{policy}").layers[0].policy == f"eval+{policy}"


def test_a_forward_that_ran_twice_in_a_step_is_recognised():
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(bnfreeze.DriftError, match=r"2 forward passes in 1 step"):
        with bnfreeze.guard(model, tensors="norm", optimizer=optimizer):
            ran(model)
            ran(model)
            optimizer.step()


def test_an_unknown_cause_is_said():
    model = layer("eval+affine")
    before = copy.deepcopy(bnfreeze.snapshot(model))  # knows no objects
    model.bn.running_mean += 1
    (drift,) = bnfreeze.verify(model, before).drifts
    assert drift.cause_code == "unknown"
    assert "trace=True" in drift.remedy


def test_figures_have_the_digits_that_tell_them_apart():
    facts = {"changed": 1, "total": 2, "first_index": (1,)}
    drift = Drift("a", "value", **facts, before=1.0, after=1.0000001192092896, max_abs=1.19e-7)
    assert "(1 → 1.00000012), largest change 1.19e-07" in sentence(drift)
    assert "(0 → -0)" in sentence(Drift("a", "value", **facts, before=0.0, after=-0.0))


def test_a_report_is_json_with_stable_keys():
    model = layer("eval")
    report = report_of(model, lambda m: m.bn.running_mean.fill_(float("nan")))
    assert not report
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (data["schema"], data["ok"], data["checked"]) == (2, False, 3)
    (drift,) = data["drifts"]
    assert list(drift) == [field.name for field in fields(Drift)]
    expected = {"name": "bn.running_mean", "kind": "value", "changed": 2, "total": 2}
    expected |= {"first_index": [0], "before": 0.0, "after": "nan", "max_abs": None}
    assert expected.items() <= drift.items()


def test_of_a_single_value_both_are_enough():
    drift = Drift("bn.num_batches_tracked", "value", 1, 1, (), 3, 4, 1.0)
    assert sentence(drift) == "bn.num_batches_tracked drifted: 3 → 4."


def test_a_report_prints_as_a_table_and_a_clean_one_as_a_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    report = report_of(layer("eval"), lambda m: m.bn.running_mean[0].fill_(5))
    text = str(report)
    assert "bn.running_mean  value  1 of 2, [0] 0 → 5" in text
    assert "error value  bn.running_mean" in text
    assert "1 drift; 3 tensors compared." in text
    assert len(repr(report)) < 240
    several = str(report_of(layer("eval+affine"), load_longer_trained))
    assert "5 names: bn.weight, bn.bias, … bn.num_batches_tracked" in several
    last = repr(replace(report, drifts=(replace(report.drifts[0], cause="longer " * 40),))).split()
    assert last[-2:] == ["longer", "…>"]
    clean = report_of(layer("eval"), nothing)
    assert clean
    assert str(clean).startswith("3 tensors unchanged, bit for bit.")
    assert clean.message == "3 tensors unchanged, bit for bit."


def test_drifts_and_tensors_are_counted_apart():
    def change(model):
        bnfreeze.unfreeze(model)
        ran(model)

    report = report_of(layer("eval+affine"), change)
    assert (len(report.drifts), report.checked) == (6, 5)
    assert report.verdict == "6 drifts; 5 tensors compared."
    last = report.message.splitlines()[-1]
    assert last == "And 5 more: 2 × value, 2 × requires-grad, 1 × thawed."


def test_a_digest_says_what_it_shows():
    model = layer("eval")
    before = bnfreeze.snapshot(model, digest=True)
    report = bnfreeze.verify(model, before)
    assert report.ok
    assert any("equal up to a collision" in note for note in report.notes)
    model.bn.running_mean[0] = 1
    (drift,) = bnfreeze.verify(model, before).drifts
    assert (drift.name, drift.changed, drift.total) == ("bn.running_mean", None, 2)


def test_a_name_is_never_printed_raw():
    model = nn.Module()
    model.register_buffer("evil\x1b[2J", torch.ones(1))
    report = report_of(model, lambda m: m._buffers["evil\x1b[2J"].zero_(), tensors="all")
    assert "\x1b" not in report.message
    assert "\x1b" not in str(report)


def test_another_model_is_recognised():
    before = bnfreeze.snapshot(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), tensors="all")
    other = nn.ModuleDict({"stem": nn.BatchNorm2d(4), "0": nn.Conv2d(3, 8, 1)})
    drifts = bnfreeze.verify(other, before).drifts
    codes = {d.cause_code for d in drifts if d.kind in {"removed", "added", "shape", "replaced"}}
    assert codes == {"other-model"}
    drifts = bnfreeze.verify(nn.BatchNorm2d(4), bnfreeze.snapshot(nn.BatchNorm2d(4), tensors="all"))
    assert {(d.kind, d.cause_code) for d in drifts.drifts} == {("replaced", "other-objects")}


def test_what_a_new_parameter_brings_is_not_blamed_on_the_old_one():
    """from_pretrained makes new parameters, after __init__ froze the old: transformers#11294."""

    def renew(name):
        return lambda m: setattr(m.bn, name, nn.Parameter(torch.rand(2)))

    one = report_of(layer("fused"), renew("weight")).drifts
    assert {d.cause_code for d in one if d.kind == "requires-grad"} == {"replaced"}
    model = layer("fused")
    both = report_of(model, lambda m: (renew("weight")(m), renew("bias")(m))).drifts
    assert {d.kind for d in both} == {"value", "requires-grad", "replaced"}
    assert {d.cause_code for d in both if d.kind != "value"} == {"other-objects"}
    before = bnfreeze.snapshot(layer("fused"))
    frozen = layer("fused")
    nn.init.ones_(frozen.bn.bias)  # frozen, too, and another model: a value that differs
    drifts = bnfreeze.verify(frozen, before).drifts
    assert {d.kind: d.cause_code for d in drifts} == dict.fromkeys(
        ("value", "replaced"), "other-objects"
    )


def give_back_and_train(model):
    bnfreeze.unfreeze(model)
    model(torch.rand(2, 2)).sum().backward()


@pytest.mark.parametrize(
    ("change", "kinds", "code"),
    [
        (bnfreeze.unfreeze, {"requires-grad"}, "unfrozen"),
        (give_back_and_train, {"requires-grad", "grad", "value"}, "unfrozen"),
        (frozen_("eval"), {"requires-grad"}, "frozen-again"),
        (frozen_("fused"), set(), "frozen-again"),
        (lambda m: setattr(m, "bn", nn.BatchNorm1d(2)), {"value", "requires-grad"}, "unfrozen"),
    ],
)
def test_a_policy_that_was_given_up_explains_what_follows_from_it(change, kinds, code):
    model = layer()
    ran(model)
    bnfreeze.freeze(model, "eval+affine")
    drifts = report_of(model, change).drifts
    assert {d.kind for d in drifts if d.cause_code == "thawed"} == kinds
    assert {d.cause_code for d in drifts if d.kind == "thawed"} == {code}
    assert {d.kind for d in drifts} <= kinds | {"thawed", "replaced"}


def test_a_gradient_of_a_parameter_that_trains_again_is_not_of_before_the_freezing():
    model = layer("eval+affine")

    def train(model):
        model.requires_grad_(True)
        model(torch.rand(2, 2)).sum().backward()

    drifts = report_of(model, train).drifts
    assert {d.cause_code for d in drifts if d.kind == "grad"} == {"affine-thawed"}


def test_a_tiny_step_may_be_weight_decay_too():
    model = layer()
    wide(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.bn.running_mean.mul_(1 - 1e-3 * 1e-4)
    drift = next(one for one in bnfreeze.diff(start, model).tensors if one.kind == "value")
    assert drift.cause_code == "averaging"
    assert "weight decay" in drift.cause


def test_giving_a_policy_back_is_not_freezing_again():
    drifts = report_of(layer("affine"), bnfreeze.unfreeze).drifts
    assert {d.kind: d.cause_code for d in drifts}["thawed"] == "unfrozen"


def test_a_change_of_values_is_named_before_a_change_of_flags():
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


def test_an_eps_that_was_set_is_a_drift(model, tmp_path):
    bnfreeze.freeze(model, "eval")
    before = bnfreeze.snapshot(model)
    before.save(tmp_path / "before.safetensors")
    model.stem[1].eps = 1e-3
    for snap in (before, bnfreeze.Snapshot.load(tmp_path / "before.safetensors")):
        (drift,) = bnfreeze.verify(model, snap).drifts
        assert (drift.name, drift.kind, drift.cause_code) == ("stem.1.eps", "value", "eps")
        assert (drift.before, drift.after) == (1e-5, 1e-3)
    model.stem[1].eps = 1e-5
    assert bnfreeze.verify(model, before)
