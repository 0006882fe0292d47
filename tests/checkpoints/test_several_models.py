"""Files with several models: each command reads all of them, or says which to choose."""

import json
import os

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze import CheckpointError
from bnfreeze.cli import main


def batch_norm(mean=0.0):
    layer = nn.BatchNorm2d(4)
    layer.running_mean.fill_(mean)
    layer.running_var.fill_(0.5)
    layer.num_batches_tracked += 1
    return layer.state_dict()


class Payload:
    def __reduce__(self):
        return os.system, ("true",)


class Config:
    """A class of a training script."""


@pytest.fixture
def save(tmp_path):
    def saved(name, **content):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return saved


def test_an_error_in_any_model_is_found(save, capsys):
    path = save("a.pt", netG=batch_norm(), netD=batch_norm(float("nan")))
    found = bnfreeze.inspect(path)
    assert not found.ok
    assert [(one.key, one.code) for one in found.findings] == [("netD", "stats-nonfinite")]
    assert [layer.key for layer in found.layers] == ["netG", "netD"]
    assert main(["inspect", path]) == 1
    out = capsys.readouterr().out
    assert "netG:\n" in out
    assert "netD:\n" in out
    assert main(["inspect", path, "--key", "netG"]) == 0
    capsys.readouterr()
    assert main(["inspect", path, "--plain"]) == 1
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [
        "netG",
        "netD",
    ]


def test_a_mapping_of_models_is_inspected_whole():
    found = bnfreeze.inspect({"a": batch_norm(), "b": [batch_norm(float("inf"))]})
    assert [(one.key, one.code) for one in found.findings] == [("b.0", "stats-nonfinite")]


def test_a_difference_in_any_part_is_found(save):
    head = nn.Linear(2, 2).state_dict()
    before = save("a.pt", netG=batch_norm(), netD=batch_norm(), head=head)
    for name, part in {
        ("netD", "running_mean"): {"netD": batch_norm(1)},
        ("head", "bias"): {"head": {**head, "bias": head["bias"] + 1}},
    }.items():
        content = {"netG": batch_norm(), "netD": batch_norm(), "head": head, **part}
        found = bnfreeze.diff(before, save("b.pt", **content))
        assert not found.ok
        assert [(one.key, one.name) for one in found.tensors if one.kind != "identical"] == [name]
    assert bnfreeze.diff(before, before).ok
    assert main(["diff", before, before]) == 0


def test_one_model_is_compared_with_one_whatever_their_keys(save, tmp_path):
    torch.save(batch_norm(), tmp_path / "a.pt")
    wrapped = save("b.pt", state_dict=batch_norm(), epoch=3)
    assert bnfreeze.diff(tmp_path / "a.pt", wrapped).ok


def test_one_model_and_several_are_compared_where_it_is_clear_which(save, tmp_path):
    several = save("b.pt", model=batch_norm(), ema=batch_norm(1))
    found = bnfreeze.diff(save("a.pt", model=batch_norm()), several)
    assert {one.key: one.kind for one in found.tensors} == {"model": "identical", "ema": "added"}
    torch.save(batch_norm(), tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="'model', 'ema'"):
        bnfreeze.diff(tmp_path / "c.pt", several)
    assert main(["diff", str(tmp_path / "c.pt"), several]) == 2
    assert main(["diff", str(tmp_path / "c.pt"), several, "--key", "model"]) == 2


def test_a_snapshot_takes_every_model_and_verify_checks_every_model(save, tmp_path, capsys):
    before = save("a.pt", netG=batch_norm(), netD=batch_norm())
    taken = str(tmp_path / "before.safetensors")
    assert main(["snapshot", before, "-o", taken]) == 0
    assert main(["verify", before, taken]) == 0
    capsys.readouterr()
    after = save("b.pt", netG=batch_norm(), netD=batch_norm(1))
    assert main(["verify", after, taken, "--json"]) == 1
    drifts = json.loads(capsys.readouterr().out)["drifts"]
    assert [drift["name"] for drift in drifts] == ["netD.running_mean"]
    # One of them is missing now.
    assert main(["verify", save("c.pt", netG=batch_norm()), taken]) == 1


def test_a_snapshot_of_one_model_is_not_guessed_to_be_of_either(save, tmp_path, capsys):
    layer = nn.BatchNorm2d(4)
    taken = str(tmp_path / "before.safetensors")
    bnfreeze.snapshot(layer, tensors="norm").save(taken)
    path = save("a.pt", model=layer.state_dict(), ema=layer.state_dict().copy())
    assert main(["verify", path, taken]) == 2
    assert "'model', 'ema'" in capsys.readouterr().err
    assert main(["verify", path, taken, "--key", "ema"]) == 0


def test_what_was_read_is_shown_where_one_model_cannot_be_read(save, tmp_path, capsys):
    path = save("a.pt", netG=batch_norm(3), netD=batch_norm(5))
    data = bytearray((tmp_path / "a.pt").read_bytes())
    five = torch.full((4,), 5.0).numpy().tobytes()
    assert data.count(five) == 1
    data[data.index(five)] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    found = bnfreeze.inspect(path)
    assert not found.ok
    assert [layer.key for layer in found.layers] == ["netG"]
    assert [(one.key, one.error) for one in found.unread] == [("netD", "CorruptCheckpointError")]
    assert main(["inspect", path]) == 2
    assert "netD" in capsys.readouterr().out


# Files that would run code.


def test_a_file_that_would_run_code_never_passes(save, tmp_path, capsys):
    path = save("a.pt", state_dict=batch_norm(), x=Payload())
    taken = str(tmp_path / "before.safetensors")
    found = bnfreeze.inspect(path)
    assert not found.ok
    assert [(one.level, one.code) for one in found.findings] == [("error", "runs-code")]
    assert not bnfreeze.diff(path, path).ok
    assert main(["inspect", path]) == 1
    assert main(["snapshot", path, "-o", taken]) == 0
    for command in (["diff", path, path], ["verify", path, taken]):
        capsys.readouterr()
        assert main(command) == 1
        assert "posix.system" in capsys.readouterr().out


def test_a_class_that_nobody_knows_is_a_warning(save, capsys):
    path = save("a.pt", state_dict=batch_norm(), x=Config())
    found = bnfreeze.inspect(path)
    assert found.ok
    assert [(one.level, one.code) for one in found.findings] == [("warning", "runs-code")]
    assert main(["diff", path, path]) == 0
    capsys.readouterr()
    assert main(["inspect", path]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"`{__name__}.Config` under 'x' was left uninterpreted" in out


def test_a_whole_model_shows_its_classes_and_settings(model, tmp_path):
    bnfreeze.freeze(model, {"stem": "eval"})
    model.head[2].eps = 1e-3
    torch.save(model, tmp_path / "a.pt")
    layers = {layer.name: layer for layer in bnfreeze.inspect(tmp_path / "a.pt").layers}
    assert layers["stem.1"].frozen_by == "bnfreeze"
    assert layers["head.2"].frozen_by is None
    assert (layers["head.2"].kind, layers["head.2"].eps) == ("BatchNorm1d", 1e-3)
    assert layers["head.2"].training is True
