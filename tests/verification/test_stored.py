"""bnfreeze snapshot and bnfreeze verify: a checkpoint compared with a snapshot."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze.cli import main
from bnfreeze.inspection.in_memory import TensorInMemory


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.add_module("head", nn.Linear(4, 2))
    model.body(torch.randn(2, 3, 8, 8))
    return model


@pytest.fixture
def files(model, tmp_path):
    """The same model twice, the second with one bit of one statistic flipped."""
    torch.save({"model": model.state_dict(), "epoch": 1}, tmp_path / "start.pt")
    before = bnfreeze.snapshot(model, tensors="norm")
    before.save(tmp_path / "live.safetensors")
    model.body[1].running_var.view(torch.int32)[2] ^= 1
    torch.save(model.state_dict(), tmp_path / "end.pt")
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--digest"], ["--all"], ["--all", "--digest"]])
def test_a_checkpoint_equals_its_own_snapshot_and_a_flipped_bit_is_found(files, capsys, more):
    kept = str(files / "frozen")
    assert main(["snapshot", str(files / "start.pt"), "-o", kept, *more]) == 0
    assert main(["verify", str(files / "start.pt"), kept]) == 0
    capsys.readouterr()
    assert main(["verify", str(files / "end.pt"), kept, "--plain"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["body.1.running_var", "value"]]


def test_the_eps_of_a_model_that_was_saved_whole_is_compared_too(model, tmp_path, capsys):
    torch.save(model, tmp_path / "start.pt")
    bnfreeze.snapshot(model, tensors="norm").save(tmp_path / "live")
    assert main(["snapshot", str(tmp_path / "start.pt"), "-o", str(tmp_path / "stored")]) == 0
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.body[1].eps = 1e-3
    torch.save(model, tmp_path / "end.pt")
    for kept in ("live", "stored"):
        for name, code in (("start", 0), ("state", 0), ("end", 1)):
            capsys.readouterr()
            found = ["verify", str(tmp_path / f"{name}.pt"), str(tmp_path / kept), "--json"]
            assert main(found) == code
        (drift,) = json.loads(capsys.readouterr().out)["drifts"]
        assert (drift["name"], drift["cause_code"]) == ("body.1.eps", "eps")


def test_a_checkpoint_is_compared_with_a_snapshot_of_the_live_model(files, capsys):
    assert main(["verify", str(files / "start.pt"), str(files / "live.safetensors")]) == 0
    assert "5 tensors unchanged, bit for bit." in capsys.readouterr().out
    live = str(files / "live.safetensors")
    assert main(["verify", str(files / "end.pt"), live, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    (drift,) = data["drifts"]
    assert (data["schema"], data["ok"], data["checked"]) == (2, False, 5)
    assert (drift["name"], drift["first_index"], drift["changed"]) == ("body.1.running_var", [2], 1)
    assert drift["cause_code"] == "unknown"
    assert "guard" in drift["remedy"]


def test_swapped_arguments_are_noticed(files, model, capsys):
    assert main(["verify", str(files / "live.safetensors"), str(files / "start.pt")]) == 2
    assert "arguments swapped" in capsys.readouterr().err
    assert main(["verify", str(files / "start.pt"), str(files / "end.pt")]) == 2
    assert "arguments swapped" not in capsys.readouterr().err
    with pytest.raises(TypeError, match=r"Expected an nn\.Module, not Snapshot"):
        bnfreeze.verify(bnfreeze.snapshot(model, tensors="norm"), model)


def test_only_what_is_selected_is_compared(files, capsys):
    live, end = str(files / "live.safetensors"), str(files / "end.pt")
    assert main(["verify", end, live, "--select", "body"]) == 1
    assert main(["snapshot", end, "-o", str(files / "h"), "--all", "--select", "head"]) == 0
    assert main(["verify", str(files / "start.pt"), str(files / "h")]) == 0
    capsys.readouterr()
    assert main(["verify", end, live, "--select", "head"]) == 2
    assert "The snapshot has nothing in head." in capsys.readouterr().err


def test_a_snapshot_of_a_checkpoint_is_compared_with_a_live_model(files, model):
    main(["snapshot", str(files / "end.pt"), "-o", str(files / "frozen"), "--all"])
    kept = bnfreeze.Snapshot.load(files / "frozen")
    bnfreeze.freeze(model, "eval")
    assert bnfreeze.verify(model, kept).ok
    with torch.no_grad():
        model.head.bias += 1
    (drift,) = bnfreeze.verify(model, kept).drifts
    assert (drift.name, drift.kind) == ("head.bias", "value")


def test_what_is_missing_or_of_another_dtype_is_a_drift(files, model, capsys):
    model.body[1].half()
    torch.save({k: v for k, v in model.state_dict().items() if "bias" not in k}, files / "half.pt")
    live = str(files / "live.safetensors")
    assert main(["verify", str(files / "half.pt"), live, "--plain"]) == 1
    kinds = dict(line.split("\t")[:2] for line in capsys.readouterr().out.splitlines())
    assert kinds == {
        "body.1.weight": "dtype",
        "body.1.bias": "removed",
        "body.1.running_mean": "dtype",
        "body.1.running_var": "dtype",
    }


def test_what_no_checkpoint_can_have_is_unverified(model, tmp_path, capsys):
    model.head.register_buffer("mask", torch.ones(2), persistent=False)
    bnfreeze.snapshot(model, tensors="all").save(tmp_path / "all.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    arguments = [str(tmp_path / "model.pt"), str(tmp_path / "all.safetensors")]
    assert main(["verify", *arguments, "--plain"]) == 1
    assert capsys.readouterr().out.split("\t")[:2] == ["head.mask", "unverified"]


@pytest.mark.parametrize("digest", [False, True])
def test_a_tied_weight_is_compared_under_each_name_that_is_there(digest, tmp_path, capsys):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    bnfreeze.snapshot(model, tensors="all", digest=digest).save(tmp_path / "kept")
    tied = model.state_dict()
    # A file may untie it, or leave all names but one out, as save_pretrained does.
    torch.save({**tied, "b.weight": tied["b.weight"] + 1}, tmp_path / "untied.pt")
    torch.save({n: t for n, t in tied.items() if n != "a.weight"}, tmp_path / "once.pt")
    untied, once = (
        ["verify", str(tmp_path / name), str(tmp_path / "kept"), "--plain"]
        for name in ("untied.pt", "once.pt")
    )
    assert main(untied) == 1
    assert capsys.readouterr().out.split("\t")[:2] == ["b.weight", "value"]
    assert main(once) == 1
    assert capsys.readouterr().out == "a.weight\tremoved\t\n"
    assert main([*once, "--select", "b"]) == 0


def test_a_shard_in_a_snapshot_is_not_compared_with_a_whole_tensor(model, tmp_path, capsys):
    state = bnfreeze.snapshot(model, tensors="norm").state
    name = "body.1.running_mean"
    facts = state.tensors[name]._replace(placement="Shard(dim=0) over (2,)")
    value = TensorInMemory(state.values[name].tensor[:2].clone())
    state = replace(
        state, tensors={**state.tensors, name: facts}, values={**state.values, name: value}
    )
    bnfreeze.Snapshot(state).save(tmp_path / "frozen")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert main(["verify", str(tmp_path / "model.pt"), str(tmp_path / "frozen"), "--plain"]) == 1
    assert capsys.readouterr().out.startswith(f"{name}\tunverified\tits sharding changed")


@pytest.mark.parametrize("more", [[], ["--digest"]])
def test_a_snapshot_takes_no_more_than_the_file_holds(more, tmp_path, capsys):
    whole = torch.zeros(10_000_000)
    torch.save({f"{i}.running_var": whole[:] for i in range(500)}, tmp_path / "a.pt")
    assert main(["snapshot", str(tmp_path / "a.pt"), "-o", str(tmp_path / "frozen"), *more]) == 2
    assert "its tensors claim 20,000,000,000 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["verify", "end.pt", "nothing"], "nothing: cannot be opened"),
        (["verify", "nothing", "live.safetensors"], "Cannot be opened"),
        (["verify", "end.pt", "start.pt"], "is not a snapshot"),
        (["snapshot", "start.pt", "-o", "end.pt"], "exists and is not a snapshot"),
        (["snapshot", "linear.pt", "-o", "frozen"], "holds no norm layer"),
        (["snapshot", "start.pt", "-o", "no/where"], "no/where: cannot be written"),
        (["snapshot", "start.pt", "-o", ""], "cannot be written"),
    ],
)
def test_what_cannot_be_done_has_exit_code_2(files, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(files)
    torch.save(nn.Linear(2, 2).state_dict(), "linear.pt")
    before = (files / "end.pt").read_bytes()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""
    assert (files / "end.pt").read_bytes() == before


def test_a_checkpoint_of_another_model_is_recognised(files, capsys):
    torch.save({f"student.{k}": v for k, v in torch.load(files / "end.pt").items()}, files / "o.pt")
    assert main(["verify", str(files / "o.pt"), str(files / "live.safetensors"), "--json"]) == 1
    drifts = json.loads(capsys.readouterr().out)["drifts"]
    assert {(d["kind"], d["cause_code"]) for d in drifts} == {("removed", "other-model")}


def test_the_command_imports_no_torch(files):
    code = """
import sys
from bnfreeze.cli import main
for line in sys.argv[1:]:
    assert main(line.split()) != 2
    assert "torch" not in sys.modules
"""
    lines = [
        "snapshot start.pt -o new --all",
        "snapshot start.pt -o new --digest",
        "verify start.pt new",
        "verify start.pt live.safetensors",
        "diff start.pt end.pt",
    ]
    done = subprocess.run([sys.executable, "-c", code, *lines], cwd=files, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("more", [[], ["--digest"]])
def test_of_files_nothing_is_said_about_live_models(files, capsys, more):
    kept = str(files / "frozen")
    main(["snapshot", str(files / "start.pt"), "-o", kept, *more])
    capsys.readouterr()
    assert main(["verify", str(files / "start.pt"), kept]) == 0
    out = capsys.readouterr().out
    assert "unchanged, bit for bit." in out
    assert "guard" not in out
    assert "optimizers" not in out
    assert ("SHA-256" in out) == bool(more)
