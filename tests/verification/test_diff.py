"""diff: of paths, state_dicts and models, in any pairing."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze.cli import main
from bnfreeze.verification.diff import ModelPair


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.add_module("head", nn.Linear(4, 2))
    return model


def test_every_pairing_says_the_same(model, tmp_path):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": start}, tmp_path / "start.pt")
    with torch.no_grad():
        model.head.bias += 1
        model.body[1].running_var[2] = 5
    torch.save(model.state_dict(), tmp_path / "end.pt")
    pairs = [(a, b) for a in (tmp_path / "start.pt", start) for b in (tmp_path / "end.pt", model)]
    found = [bnfreeze.diff(a, b) for a, b in pairs]
    without_keys = [[replace(change, key="") for change in one.tensors] for one in found]
    assert all(one == without_keys[0] for one in without_keys)
    assert {change.key for change in found[0].tensors} == {"model"}
    changed = {c.name: (c.kind, c.changed) for c in found[0].tensors if c.kind != "identical"}
    assert changed == {"body.1.running_var": ("value", 1), "head.bias": ("value", 2)}
    assert not any(found)
    assert bnfreeze.diff(start, str(tmp_path / "start.pt"))
    assert bnfreeze.diff(start, model, select="body.0").ok
    assert not bnfreeze.diff(start, model, select=["body.0", "head"]).ok
    data = json.loads(json.dumps(found[0].to_dict(), allow_nan=False))
    assert (data["schema"], data["ok"], data["modules"]) == (
        2,
        False,
        [
            {"key": "model", "name": "body", "identical": False},
            {"key": "model", "name": "head", "identical": False},
        ],
    )


def test_a_diff_tells_what_verify_tells(model):
    before = bnfreeze.snapshot(model, tensors="all")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.body(torch.randn(2, 3, 8, 8))
    live = {
        d.name: (d.kind, d.changed, d.cause_code) for d in bnfreeze.verify(model, before).drifts
    }
    stored = {
        c.name: (c.kind, c.changed, c.cause_code)
        for c in bnfreeze.diff(start, model).tensors
        if c.kind != "identical"
    }
    assert live == stored
    assert [f.code for f in bnfreeze.diff(start, model).findings] == ["stats-not-frozen"]


def test_a_model_compared_with_itself_is_never_a_pass(model):
    model.to(memory_format=torch.channels_last)
    before = model.state_dict()  # not a copy: a classic
    with torch.no_grad():
        model.head.bias += 1
    for first in (before, {"model": model.state_dict()}):
        found = bnfreeze.diff(first, model)
        assert [(f.code, f.level) for f in found.findings] == [("model-same-memory", "error")]
        assert not found
        assert "same memory" in repr(found)
    copied = copy.deepcopy(before)
    assert bnfreeze.diff(copied, model).findings == bnfreeze.diff(copied, before).findings == ()
    # Two models may share a part.
    other = {**copied, "head.bias": model.head.bias}
    [finding] = bnfreeze.diff(other, model).findings
    assert (finding.code, finding.level) == ("model-same-memory", "warning")
    assert finding.message.startswith("1 of 9 tensors")
    assert bnfreeze.diff(other, model)


def test_an_eps_that_differs_is_an_error_wherever_both_sides_say_what_it_is(model, tmp_path):
    # As of a model that is built again for other classes, and not given its eps again.
    other = copy.deepcopy(model)
    other.body[1].eps = 1e-3
    for name, one in (("a", model), ("b", other)):
        torch.save(one, tmp_path / f"{name}.pt")
    outer = nn.ModuleDict({"student": other})
    frozen = copy.deepcopy(model)
    bnfreeze.freeze(frozen, "fused")
    for first in (model, tmp_path / "a.pt", frozen):
        for second in (other, tmp_path / "b.pt", nn.DataParallel(other), outer):
            found = bnfreeze.diff(first, second)
            (said,) = (one for one in found.findings if one.level == "error")
            assert (said.code, said.name) == ("layer-eps-differs", "body.1")
            assert said.message == "eps is 1e-05 in the first and 0.001 in the second."
            assert not found.ok
            assert all(change.kind == "identical" for change in found.tensors)
            assert "But eps differs" in found.sheet().verdict
        assert bnfreeze.diff(first, other, select="head").ok
        # A state_dict does not have it.
        assert bnfreeze.diff(first, copy.deepcopy(other.state_dict())).ok
        assert bnfreeze.diff(first, copy.deepcopy(model)).ok


def test_the_eps_of_an_onnx_model_is_that_of_the_model_it_was_made_from(model, tmp_path):
    pytest.importorskip("onnx")
    body = model.body.eval()
    body[1].eps = 1e-3
    path = str(tmp_path / "a.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            *(body, (torch.randn(1, 3, 8, 8),), path),
            dynamo=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
    assert bnfreeze.diff(path, body).findings == ()  # although float32 does not hold 0.001
    body[1].eps = 1e-5
    assert [one.code for one in bnfreeze.diff(path, body).findings] == ["layer-eps-differs"]


def test_what_cannot_be_compared_is_not_identical(model):
    state = {"a": torch.eye(2).to_sparse(), "b": torch.ones(2)}
    found = bnfreeze.diff(state, {**state, "c": torch.ones(1)})
    assert [c.kind for c in found.tensors] == ["unverified", "identical", "added"]
    with pytest.raises(TypeError, match=r"nn\.Module"):
        bnfreeze.diff(state, 3)
    with pytest.raises(bnfreeze.PolicyError):
        bnfreeze.diff(model, model, select="nowhere")


# Names with a prefix more


def fine_tuned(state, prefix="model.backbone."):
    """The state_dict inside another model, as trainers save it, without the head."""
    body = {f"{prefix}{name}": value.clone() for name, value in state.items() if "head" not in name}
    return {**body, "model.neck.weight": torch.ones(2), "model.neck.bias": torch.ones(2)}


def kinds(found):
    return {change.name: change.kind for change in found.tensors if change.kind != "identical"}


def test_a_prefix_is_found_applied_and_said_and_missing_is_not_added(model):
    state = model.state_dict()
    tuned = fine_tuned(state)
    tuned["model.backbone.body.1.bias"][0] += 1
    changes = {"body.1.bias": "value"}
    head = {"head.weight", "head.bias"}
    neck = {"model.neck.weight", "model.neck.bias"}
    there = bnfreeze.diff(state, {"state_dict": tuned})
    assert there.pairs == (ModelPair("", "state_dict", (("", "model.backbone."),), 7),)
    assert kinds(there) == (changes | dict.fromkeys(head, "missing") | dict.fromkeys(neck, "added"))
    back = bnfreeze.diff({"state_dict": tuned}, state)
    assert back.pairs == (ModelPair("state_dict", "", (("model.backbone.", ""),), 7),)
    assert kinds(back) == (changes | dict.fromkeys(head, "added") | dict.fromkeys(neck, "missing"))
    shown = str(there)
    assert "'' → 'model.backbone.'" in shown
    assert "2 tensors missing. 2 tensors added." in " ".join(shown.split())
    # A pattern may have the names of either.
    for select in ("body.0", "model.backbone.body.0"):
        assert bnfreeze.diff(state, tuned, select=select).ok
    assert not bnfreeze.diff(state, tuned, select="body.1").ok


def test_one_prefix_may_stand_in_the_place_of_another(model):
    state = {f"encoder.{name}": value for name, value in model.state_dict().items()}
    found = bnfreeze.diff(state, fine_tuned(model.state_dict()))
    assert found.pairs[0].prefixes == (("encoder.", "model.backbone."),)
    assert found.pairs[0].in_both == 7


def test_where_several_prefixes_fit_they_are_listed_and_one_is_chosen(model, tmp_path):
    state = model.state_dict()
    twins = {f"{name}.{k}": v for name in ("student", "teacher") for k, v in state.items()}
    with pytest.raises(bnfreeze.CheckpointError, match=r"'student\.' .* 'teacher\.'"):
        bnfreeze.diff(state, twins)
    found = bnfreeze.diff(state, twins, prefixes={"": "teacher"})
    assert kinds(found) == {f"student.{name}": "added" for name in state}
    assert kinds(bnfreeze.diff(twins, twins)) == {}
    paths = [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    for path, content in zip(paths, (state, twins), strict=True):
        torch.save(content, path)
    assert main(["diff", *paths]) == 2
    assert main(["diff", *paths, "--map", "=student"]) == 1
    both = ["--map", "student=teacher", "--map", "teacher=student"]
    assert main(["diff", paths[1], paths[1], *both]) == 0
    assert main(["diff", *paths, "--map", "=stduent"]) == 2
    with pytest.raises(SystemExit):
        main(["diff", *paths, "--map", "student"])


def test_names_that_have_little_in_common_are_not_matched(model):
    other = {f"other.{name}": torch.ones(3) for name in ("a.weight", "b.weight", "c.bias")}
    found = bnfreeze.diff(model.state_dict(), other)
    assert found.pairs[0].prefixes == ()
    assert {change.kind for change in found.tensors} == {"missing", "added"}
    one = {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}
    with pytest.raises(bnfreeze.PolicyError, match="would both become"):
        bnfreeze.diff(one, {"c.weight": torch.ones(2)}, prefixes={"a": "c", "b": "c"})


# Several models, and keys


def test_each_side_has_its_key(model, tmp_path):
    state = model.state_dict()
    moved = {name: value + 1 for name, value in state.items()}
    end = {"model": copy.deepcopy(state), "model_ema": moved}
    assert bnfreeze.diff(state, end, key=(None, "model")).ok
    assert not bnfreeze.diff(state, end, key=(None, "model_ema")).ok
    assert bnfreeze.diff(end, copy.deepcopy(end), key="model_ema").ok
    torch.save(end, tmp_path / "end.pt")
    path = str(tmp_path / "end.pt")
    assert main(["diff", path, path, "--key-a", "model", "--key-b", "model_ema"]) == 1
    assert main(["diff", path, path, "--key", "model_ema", "--key-a", "model_ema"]) == 0


def test_models_are_paired_by_key_and_a_model_without_a_partner_is_said(model):
    state = model.state_dict()
    twins = {"model": dict(state), "gan": dict(state)}
    found = bnfreeze.diff(copy.deepcopy(twins), {"ema": dict(state), "model": dict(state)})
    # Two are left, which fit.
    assert [(pair.first, pair.second) for pair in found.pairs] == [
        ("model", "model"),
        ("gan", "ema"),
    ]
    assert found.ok
    other = {f"{name}.x": value for name, value in state.items()}
    found = bnfreeze.diff(twins, {"model": state, "other": other})
    assert [(pair.first, pair.second) for pair in found.pairs] == [
        ("model", "model"),
        ("gan", None),
        (None, "other"),
    ]
    assert {(change.key, change.kind) for change in found.tensors} == {
        ("model", "identical"),
        ("gan", "missing"),
        ("other", "added"),
    }
    assert "Only the first has gan" in str(found)
    assert "Bit-identical: model. Changed: gan, other." in " ".join(str(found).split())
    # One file has one of the two models of the other.
    found = bnfreeze.diff({"net": state}, {"encoder": fine_tuned(state), "decoder": other})
    assert [(pair.first, pair.second) for pair in found.pairs] == [
        ("net", "encoder"),
        (None, "decoder"),
    ]


def test_a_model_that_cannot_be_read_does_not_hide_the_others(model, tmp_path):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = {**state, "body.1.running_var": torch.full((4,), 5.0)}
    path = tmp_path / "a.pt"
    torch.save({"netG": state, "netD": other}, path)
    data = bytearray(path.read_bytes())
    part = other["body.1.running_var"].numpy().tobytes()
    assert data.count(part) == 1
    data[data.index(part)] ^= 1
    path.write_bytes(data)
    found = bnfreeze.diff(path, path)
    assert [(one.key, one.error) for one in found.unread] == [("netD", "CorruptCheckpointError")]
    assert {(change.key, change.kind) for change in found.tensors} == {("netG", "identical")}
    assert not found.ok
    assert "1 of 2 models were not read" in str(found)
    assert main(["diff", str(path), str(path)]) == 2


# Averages


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
def test_the_rounding_of_an_average_is_named_and_stays_a_difference(model, decay):
    with torch.no_grad():
        model.body[1].running_var.uniform_(0.5, 2)
    state = model.state_dict()
    average = {name: value.clone() for name, value in state.items()}
    for name, value in average.items():
        if value.is_floating_point():
            for _ in range(1000):
                value.mul_(decay).add_(state[name], alpha=1 - decay)
    found = bnfreeze.diff(state, average)
    assert not found.ok
    assert [(one.level, one.code) for one in found.findings] == [("note", "model-averaged")]
    average["head.bias"] += 0.1
    moved = {change.name for change in found.tensors if change.kind == "value"} | {"head.bias"}
    [found] = bnfreeze.diff(state, average).findings
    assert f"{len(moved) - 1} of {len(moved)} tensors that moved " in found.message


def test_a_bias_whose_gradient_is_rounding_alone_is_no_average(model):
    state = model.state_dict()
    trained = {name: value + 0.1 for name, value in state.items()}
    trained["head.bias"] = state["head.bias"] * (1 + 2**-23)
    assert "model-averaged" not in {f.code for f in bnfreeze.diff(state, trained).findings}


@pytest.mark.parametrize("key", ["opt", "optimizer", "adam_g"])
def test_the_state_of_an_optimizer_is_no_model_whatever_its_key(key, tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    torch.save({"g": model.state_dict()}, tmp_path / "a.pt")
    torch.save({"g": model.state_dict(), key: optimizer.state_dict()}, tmp_path / "b.pt")
    assert bnfreeze.diff(tmp_path / "a.pt", tmp_path / "b.pt").ok
