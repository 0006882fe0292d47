"""A few families of timm's models; the whole is `python -m tests.sweeps.timm_models FILE`."""

import pytest

pytest.importorskip("timm")
from tests.sweeps import timm_models, torchvision_models


@pytest.mark.parametrize("name", timm_models.QUICK)
def test_a_model_of_timm_keeps_every_promise(name):
    found = timm_models.line(name)
    assert found.startswith(name)
    assert found.endswith(" ok")


def test_a_broken_promise_stands_in_the_line(monkeypatch):
    monkeypatch.setattr(torchvision_models, "check", lambda *_: ["something moved"])
    assert "eval+affine: something moved; fused: some" in timm_models.line("test_efficientnet")


def test_models_without_norm_layers_and_too_large_ones_are_passed_over(monkeypatch):
    assert timm_models.line("test_vit") is None
    monkeypatch.setattr(timm_models, "LARGEST", 1000)
    assert timm_models.line("test_efficientnet") is None


def test_what_stands_in_the_file_is_not_swept_again(tmp_path, monkeypatch):
    path = tmp_path / "swept.txt"
    swept = []
    monkeypatch.setattr(timm_models, "line", lambda name, _: swept.append(name) or f"{name} 1 ok")
    monkeypatch.setattr(timm_models, "size", lambda name: (10, 1))
    path.write_text("test_byobnet 1 failed\n")
    assert timm_models.main([str(path), "test_byobnet", "test_efficientnet"]) == 1
    assert "test_byobnet" not in swept
    assert "test_efficientnet" in swept
    lines = path.read_text().splitlines()
    assert lines[1:3] == ["test_byobnet 1 failed", "test_efficientnet 1 ok"]
    assert ": 1 failed." in path.read_text()
