"""A few families of timm's models; the whole is `python -m tests.sweep_timm FILE`."""

import pytest

pytest.importorskip("timm")
from . import sweep, sweep_timm


@pytest.mark.parametrize("name", sweep_timm.QUICK)
def test_a_model_of_timm_keeps_every_promise(name):
    told = sweep_timm.line(name)
    assert told.startswith(name)
    assert told.endswith(" ok")


def test_a_broken_promise_stands_in_the_line(monkeypatch):
    monkeypatch.setattr(sweep, "check", lambda *_: ["something moved"])
    assert "eval+affine: something moved; fused: some" in sweep_timm.line("test_efficientnet")


def test_models_without_norm_layers_and_too_large_ones_are_passed_over(monkeypatch):
    assert sweep_timm.line("test_vit") is None
    monkeypatch.setattr(sweep_timm, "LARGEST", 1000)
    assert sweep_timm.line("test_efficientnet") is None


def test_what_stands_in_the_file_is_not_swept_again(tmp_path, monkeypatch):
    path = tmp_path / "swept.txt"
    swept = []
    monkeypatch.setattr(sweep_timm, "line", lambda name: swept.append(name) or f"{name} 1 ok")
    monkeypatch.setattr(sweep_timm, "size", lambda name: (10, 1))
    path.write_text("test_byobnet 1 failed\n")
    assert sweep_timm.main([str(path), "test_byobnet", "test_efficientnet"]) == 1
    assert "test_byobnet" not in swept
    assert "test_efficientnet" in swept
    lines = path.read_text().splitlines()
    assert lines[1:3] == ["test_byobnet 1 failed", "test_efficientnet 1 ok"]
    assert ": 1 failed." in path.read_text()
