"""diff: of paths, state_dicts and models, in any pairing."""

import json

import pytest
import torch
from torch import nn

import bnfreeze


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
    assert all(one.tensors == found[0].tensors for one in found)
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
        {"body": False, "head": False},
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


def test_what_cannot_be_compared_is_not_identical(model):
    state = {"a": torch.eye(2).to_sparse(), "b": torch.ones(2)}
    found = bnfreeze.diff(state, {**state, "c": torch.ones(1)})
    assert [c.kind for c in found.tensors] == ["unverified", "identical", "added"]
    with pytest.raises(TypeError, match=r"nn\.Module"):
        bnfreeze.diff(state, 3)
    with pytest.raises(bnfreeze.PolicyError):
        bnfreeze.diff(model, model, select="nowhere")
