"""The command: what it prints, where to, and with which exit code."""

import argparse
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bnfreeze.cli import main
from bnfreeze.findings import KINDS, PAGES
from bnfreeze.output import progress_line
from tests.checkpoints.formats import save_safetensors, save_zip


@pytest.fixture
def sound(model, tmp_path):
    return save_zip(model.state_dict(), tmp_path / "sound.pt")


@pytest.fixture
def sick(model, tmp_path):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["head.2.running_var"][1] = float("nan")
    return save_zip({"model": state}, tmp_path / "sick.pt")


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_the_exit_code_tells_sound_from_sick_from_unreadable(command, sound, sick, tmp_path):
    assert command("inspect", sound)[0] == 0
    assert command("inspect", sick)[0] == 1
    assert command("inspect", tmp_path / "missing.pt")[0] == 2
    assert command("inspect", sound, sick)[0] == 1
    assert command("inspect", sick, tmp_path / "missing.pt", sound)[0] == 2


def test_of_several_files_the_readable_are_shown(command, sound, tmp_path):
    code, out, err = command("inspect", tmp_path / "missing.pt", sound)
    assert code == 2
    assert "4 norm layers" in out
    assert err == f"bnfreeze: {tmp_path}/missing.pt: Cannot be opened: No such file or directory.\n"


def test_the_picture_at_80_columns(command, sick, monkeypatch):
    monkeypatch.chdir(sick.parent)
    _, out, err = command("inspect", "sick.pt")
    lines = [line.rstrip() for line in out.splitlines()]
    assert err == ""
    assert lines[0] == "sick.pt"
    assert "28 tensors" in lines[1]
    assert lines[3] == "error stats-nonfinite  head.2"
    assert "1 of 5 variances" in lines[4]
    table = next(i for i, line in enumerate(lines) if line.startswith(" layer"))
    assert re.match(r" layer +C +mean +variance +[\d.e-]+ +[\d.e-]+$", lines[table])
    assert re.match(
        r" stem\.1 +4 +-?[\d.]+…-?[\d.]+ +[\d.]+…[\d.]+ +<?[▁▂▃▄▅▆▇█ ]+>?$", lines[table + 2]
    )
    assert lines[table + 6].startswith(" C: channels; ")
    assert lines[-1] == "4 norm layers in float32, 3 batches counted: 1 layer is broken."
    assert max(map(len, lines)) <= 80


def test_layers_are_shown_as_a_tree(command, tmp_path):
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    out = command("inspect", save_zip(state, tmp_path / "a.pt"))[1]
    assert re.search(r"\n bn1 +64 .*\n layer1 *\n   0\.bn1 +64 ", out)
    assert "layer1.0.bn1 " not in out.partition("─")[2]
    out = command("inspect", tmp_path / "a.pt", "--sort", "features")[1]
    assert re.search(r"─ *\n layer4\.0\.bn1 +512 ", out)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 160])
def test_no_line_is_wider_than_the_terminal(command, sick, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (("inspect", sick), ("diff", sick, sick)):
        out = command(*arguments)[1]
        assert max(map(len, out.splitlines())) <= width


def test_a_wide_terminal_shows_more(command, sound, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = command("inspect", sound)[1]
    heading = next(line for line in out.splitlines() if " layer" in line)
    assert len(re.findall(r"-?[\d.]+(?:e-\d+)?", heading)) == 4


def test_json_is_one_object_with_stable_keys(command, sound, sick, tmp_path):
    code, out, _ = command("inspect", sound, sick, tmp_path / "missing", "--json")
    data = json.loads(out)
    assert code == 2
    assert list(data) == ["schema", "ok", "files"]
    assert data["schema"] == 2
    assert data["ok"] is False
    first, second, third = data["files"]
    assert list(first) == [
        "path",
        "kind",
        "models",
        "tensors",
        "bytes",
        "uninterpreted",
        "remarks",
        "unread",
        "ok",
        "layers",
        "findings",
    ]
    assert list(first["layers"][0]) == [
        "name",
        "kind",
        "num_features",
        "batches",
        "dtype",
        "affine",
        "mean",
        "var",
        "near_dead",
        "weight",
        "key",
        "eps",
        "momentum",
        "training",
        "frozen_by",
    ]
    assert list(first["layers"][0]["var"]) == ["low", "high", "deciles"]
    assert first["ok"] is True
    assert second["ok"] is False
    assert second["findings"][0]["code"] == "stats-nonfinite"
    assert third["error"]["kind"] == "CheckpointError"


def keys_of(value):
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def test_every_key_of_the_json_is_documented(command, sound, sick, model, tmp_path):
    torch.save({"args": argparse.Namespace(), "model": model}, tmp_path / "whole.pt")
    command("snapshot", sound, "-o", tmp_path / "before")
    keys = set()
    for arguments in (
        ("inspect", sick, tmp_path / "whole.pt", tmp_path / "missing.pt"),
        ("diff", sound, sick),
        ("verify", sick, tmp_path / "before"),
        ("explain",),
    ):
        keys |= keys_of(json.loads(command(*arguments, "--json")[1]))
    page = (Path(__file__).parent.parent / "docs" / "json.md").read_text(encoding="utf-8")
    assert keys - set(re.findall(r"`(\w+)`", page)) == set()


def test_plain_is_one_line_a_layer(command, sound, sick):
    out = command("inspect", sick, "--plain")[1]
    assert len(out.splitlines()) == 4
    cells = out.splitlines()[3].split("\t")
    assert cells[0] == "head.2"
    assert cells[2:4] == ["C=5", "batches=3"]
    assert cells[-1] == "stats-nonfinite"
    lines = command("inspect", sick, sound, "--plain")[1].splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(sick)] * 4 + [str(sound)] * 4


def test_select_narrows_and_says_what_was_meant(command, sick):
    out = command("inspect", sick, "--select", "backbone", "--select", "st?m", "--plain")[1]
    assert [line.split("\t")[0] for line in out.splitlines()] == [
        "stem.1",
        "backbone.0.1",
        "backbone.1.1",
    ]
    assert command("inspect", sick, "--select", "backbone")[0] == 0
    code, _, err = command("inspect", sick, "--select", "bakbone")
    assert code == 2
    assert "'bakbone' matches nothing in it. Did you mean" in err
    assert command("inspect", sick, "--select", "a..b")[0] == 2


@pytest.mark.parametrize("sort", ["name", "features", "batches", "mean", "var", "dead"])
def test_sorting_keeps_every_layer(command, sick, sort):
    lines = command("inspect", sick, "--sort", sort, "--plain")[1].splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == [
        "backbone.0.1",
        "backbone.1.1",
        "head.2",
        "stem.1",
    ]


def test_names_are_sorted_as_people_count_and_dead_channels_by_number(command, tmp_path):
    state = {}
    for name, dead in (("b.10", 1), ("b.2", 3), ("b.2.a", 2), ("a.1", 0), (f"b.{'9' * 900}", 0)):
        variance = torch.ones(2 if dead == 1 else 6)
        variance[:dead] = 0
        state |= {
            f"{name}.running_mean": torch.zeros_like(variance),
            f"{name}.running_var": variance,
        }
    path = save_zip(state, tmp_path / "a.pt")

    def names(sort):
        lines = command("inspect", path, "--plain", "--sort", sort)[1].splitlines()
        return [line.split("\t")[0] for line in lines]

    assert names("name")[:-1] == ["a.1", "b.2", "b.2.a", "b.10"]
    assert names("dead")[:3] == ["b.2", "b.2.a", "b.10"]


def test_weights_are_shown_where_asked_for(command, sound):
    for form in ([], ["--plain"]):
        assert not re.search(r"\sweight", command("inspect", sound, *form)[1])
    assert re.search(r" weight *\n", command("inspect", sound, "--weights")[1])
    lines = command("inspect", sound, "--weights", "--plain")[1].splitlines()
    assert all(re.search(r"\tweight=[\d.-]+\.\.[\d.]+\t", line) for line in lines)


def test_key_chooses(command, model, tmp_path):
    path = save_zip(
        {"model": model.state_dict(), "model_ema": model.state_dict()}, tmp_path / "a.pt"
    )
    assert "under the key 'model_ema'" in command("inspect", path, "--key", "model_ema")[1]
    assert "No state_dict under the key 'x'" in command("inspect", path, "--key", "x")[2]


def test_pictures_are_saved_whole_and_in_place(command, sound, sick, tmp_path):
    svg, html = tmp_path / "a.svg", tmp_path / "a.html"
    svg.write_text("<svg>what was here before</svg>")
    assert command("inspect", sound, sick, "--svg", svg, "--html", html)[0] == 1
    assert svg.read_text().startswith("<svg")
    assert "url(http" not in svg.read_text()
    assert "head.2" in html.read_text()
    assert "sound.pt" in html.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.html",
        "a.svg",
        "sick.pt",
        "sound.pt",
    ]
    code, _, err = command("inspect", sound, "--svg", tmp_path / "no" / "a.svg")
    assert code == 2
    assert "cannot be written: No such file or directory" in err


def test_a_checkpoint_is_never_written_over(command, sound):
    before = sound.read_bytes()
    code, _, err = command("inspect", sound, "--svg", sound)
    assert code == 2
    assert "is there already, and is no picture" in err
    assert sound.read_bytes() == before


def test_what_is_no_file_is_written_to_and_not_replaced(command, sound):
    assert command("inspect", sound, "--svg", "/dev/null")[0] == 0
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["inspect"],
        ["diff", "a"],
        ["nonsense"],
        ["inspect", "a", "--sort", "nonsense"],
        ["inspect", "a", "--unsafe"],
        ["inspect", "a", "--json", "--plain"],
    ],
)
def test_wrong_usage_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: bnfreeze" in capsys.readouterr().err


def test_help_has_examples_and_version_is_the_packages(capsys):
    import bnfreeze

    for arguments, words in (
        (["--help"], "examples:"),
        (["inspect", "--help"], "--select PATTERN"),
        (["--version"], f"bnfreeze {bnfreeze.__version__}\n"),
    ):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
        assert words in capsys.readouterr().out


def test_a_mistyped_command_and_a_forgotten_one_are_hinted_at(sound, capsys):
    for word, hint in (("inspet", "'inspect'"), (str(sound), f"bnfreeze inspect {sound}")):
        with pytest.raises(SystemExit) as error:
            main([word])
        assert error.value.code == 2
        assert hint in capsys.readouterr().err


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_help_imports_neither_torch_nor_rich_nor_numpy():
    done = run("-X", "importtime", "-m", "bnfreeze", "--help")
    assert done.returncode == 0
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in modules
    assert not modules & {"torch", "rich", "numpy", "safetensors", "importlib.metadata"}
    assert not any(module.startswith("bnfreeze.findings") for module in modules)


def test_a_reader_that_has_seen_enough_is_no_error(sound):
    code = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-m', 'bnfreeze', 'inspect', sys.argv[1]], "
        "stdout=subprocess.PIPE, stderr=subprocess.PIPE); "
        "p.stdout.close(); err = p.stderr.read(); sys.exit(p.wait() or bool(err))"
    )
    assert run("-c", code, sound).returncode == 0


def test_a_terminal_without_unicode_is_served(sound):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    done = run("-m", "bnfreeze", "inspect", sound, env=environment)
    assert done.returncode == 0
    assert "4 norm layers" in done.stdout
    assert "\\u" not in done.stdout


def test_explain_gives_a_page_or_lists_all_and_hints_at_the_nearest(command):
    code, page, _ = command("explain", "never-trained")
    assert code == 0
    assert page.startswith("# never-trained\n")
    assert " ".join(page.split()) == " ".join(PAGES["never-trained"].split())
    assert max(map(len, page.splitlines())) <= 80
    listed = command("explain")[1].splitlines()
    assert [line.split()[0] for line in listed] == list(KINDS)
    data = json.loads(command("explain", "stats-dtype", "--json")[1])
    assert data["schema"] == 2
    assert [kind["code"] for kind in data["findings"]] == ["stats-dtype"]
    code, out, err = command("explain", "stats-dtpe")
    assert (code, out) == (2, "")
    assert "stats-dtype" in err


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("bnfreeze insp", ["inspect "]),
        ("bnfreeze inspect --so", ["--sort "]),
        ("bnfreeze inspect --sort d", ["dead "]),
        ("bnfreeze inspect a.pt --js", ["--json "]),
        ("bnfreeze explain never", ["never-trained "]),
        ("bnfreeze inspect start", ["start.pt "]),
    ],
)
def test_argcomplete_completes(tmp_path, line, completed):
    pytest.importorskip("argcomplete")
    (tmp_path / "start.pt").touch()
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    done = run("-m", "bnfreeze", cwd=tmp_path, env={**os.environ, **asked})
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "words").read_text().split("\n") == completed


def on_a_terminal(*arguments, **environment):
    """What the command writes when stdout and stderr are a terminal."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "bnfreeze", *map(str, arguments)],
        stdout=child,
        stderr=child,
        env=environment,
    )
    os.close(child)
    written = io.BytesIO()
    try:
        while data := os.read(parent, 65536):
            written.write(data)
    except OSError:
        pass  # Linux says so when the other end is closed.
    process.wait()
    os.close(parent)
    return written.getvalue().decode()


def test_colour_is_for_terminals_and_no_color_is_honoured(sick):
    assert "\x1b[" in on_a_terminal("inspect", sick)
    assert "\x1b[3" not in on_a_terminal("inspect", sick, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal("inspect", sick, "--json")
    assert "\x1b" not in run("-m", "bnfreeze", "inspect", sick).stdout


class Terminal(io.StringIO):
    def __init__(self):
        super().__init__()
        self.written = threading.Event()

    def isatty(self):
        return True

    def write(self, text):
        super().write(text)
        self.written.set()


def test_progress_is_shown_after_a_second_on_a_terminal_alone(monkeypatch, capsys):
    with progress_line("run/last.pt") as tell:
        tell(2, 5)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_line("run/last.pt"):
        pass
    assert sys.stderr.getvalue() == ""  # the second was not over
    monkeypatch.setattr("bnfreeze.output._SECOND", 0.05)
    with progress_line("run/la\x1bst.pt") as tell:
        tell(2, 5)
        assert sys.stderr.written.wait(60)
    shown = sys.stderr.getvalue()
    assert shown.startswith("\rla\\x1bst.pt: 1 s, tensor 2 of 5\x1b[K")
    assert shown.endswith("\r\x1b[K")


# diff


@pytest.fixture
def tuned(model, tmp_path):
    """The model with another head, as a trainer would save it."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["head.1.weight"][0, 0] += 0.5
    state["head.2.bias"] += 1
    return save_zip(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1},
        tmp_path / "tuned.pt",
    )


def test_diff_says_what_moved_and_what_did_not(command, sound, tuned):
    code, out, _ = command("diff", sound, tuned)
    assert code == 1
    assert re.search(r"backbone +identical +identical +identical", out)
    assert re.search(r"head +identical +1 of 2 moved +1 of 2 moved +1", out)
    assert "Bit-identical except for head. All 12 running statistics are bit-identical." in (
        " ".join(out.split())
    )
    assert "without 'module.'" in " ".join(out.split())
    assert command("diff", sound, tuned, "--select", "backbone")[0] == 0
    assert command("diff", sound, sound)[0] == 0


def test_diff_in_json_and_plain(command, sound, tuned):
    data = json.loads(command("diff", sound, tuned, "--json")[1])
    assert list(data) == [
        "schema",
        "ok",
        "first",
        "second",
        "pairs",
        "unread",
        "modules",
        "tensors",
        "findings",
    ]
    assert data["schema"] == 2
    assert [(part["name"], part["identical"]) for part in data["modules"]] == [
        ("stem", True),
        ("backbone", True),
        ("head", False),
    ]
    moved = {x["name"]: x for x in data["tensors"] if x["kind"] != "identical"}
    assert set(moved) == {"head.1.weight", "head.2.bias"}
    assert moved["head.1.weight"] == {
        "name": "head.1.weight",
        "role": "weight",
        "kind": "value",
        "total": 5 * 6 * 64,
        "changed": 1,
        "max_abs": pytest.approx(0.5),
        "max_ulps": moved["head.1.weight"]["max_ulps"],
        "cause_code": "unknown",
        "cause": moved["head.1.weight"]["cause"],
        "key": "",
    }
    lines = command("diff", sound, tuned, "--plain")[1].splitlines()
    assert f"value\thead.1.weight\t1/{5 * 6 * 64}\t0.5" in lines
    assert len(lines) == 28


def test_diff_tells_of_statistics_that_leaked(command, sound, model, images, tmp_path):
    model.train()
    with torch.no_grad():
        model(images)
    code, out, _ = command("diff", sound, save_zip(model.state_dict(), tmp_path / "b.pt"))
    assert code == 1
    assert "stats-not-frozen" in out
    assert "4 layers: stem.1, backbone.0.1, … head.2" in out
    # The counter's step of one is no size.
    assert not re.search(r" 1\n", out)


def test_diff_compares_bits_and_names(command, tmp_path):
    nan = torch.tensor([float("nan")])
    one = {
        "same.nan": nan,
        "zero.sign": torch.zeros(1),
        "other.dtype": torch.zeros(2),
        "other.shape": torch.zeros(2),
        "gone.away": torch.zeros(1),
        "inf.x": torch.zeros(1),
        "half.x": torch.zeros(3, dtype=torch.bfloat16),
        "f8.x": torch.zeros(2).to(torch.float8_e5m2),
        "c.x": torch.zeros(3, dtype=torch.complex128),
        "t.x": torch.arange(6.0).reshape(2, 3),
    }
    two = {
        "same.nan": nan.clone(),
        "zero.sign": -torch.zeros(1),
        "other.dtype": torch.zeros(2).half(),
        "other.shape": torch.zeros(1, 2),
        "new.one": torch.zeros(1),
        "inf.x": torch.tensor([float("inf")]),
        "half.x": torch.tensor([0, 2, 0], dtype=torch.bfloat16),
        "f8.x": torch.ones(2).to(torch.float8_e5m2),
        "c.x": torch.tensor([0, 1j, 1 + 1j], dtype=torch.complex128),
        "t.x": torch.arange(6.0).reshape(2, 3).t().contiguous().t(),
    }
    paths = [save_zip(one, tmp_path / "a.pt"), save_zip(two, tmp_path / "b.pt")]
    data = json.loads(command("diff", *paths, "--json")[1])["tensors"]
    assert {x["name"]: (x["kind"], x["changed"], x["max_abs"]) for x in data} == {
        "same.nan": ("identical", 0, None),
        "zero.sign": ("value", 1, 0.0),
        "other.dtype": ("dtype", 0, None),
        "other.shape": ("shape", 0, None),
        "gone.away": ("missing", 0, None),
        "inf.x": ("value", 1, None),
        "half.x": ("value", 1, 2.0),
        "f8.x": ("value", 2, None),
        "c.x": ("value", 2, pytest.approx(2**0.5)),
        "t.x": ("identical", 0, None),
        "new.one": ("added", 0, None),
    }
    assert command("diff", *paths)[0] == 1


def test_diff_across_formats(command, sound, model, tmp_path):
    other = save_safetensors(model.state_dict(), tmp_path / "a.safetensors")
    code, out, _ = command("diff", sound, other)
    assert code == 0
    assert "Bit-identical: all 28 tensors." in out


def test_diff_of_large_tensors_goes_piece_by_piece(command, tmp_path):
    one = {"x.weight": torch.zeros(3, 1_000_000), "y.weight": torch.zeros(3_000_000).double()}
    two = {name: value.clone() for name, value in one.items()}
    two["x.weight"][2, 999_999] = 1
    two["y.weight"] = two["y.weight"].reshape(3, -1).t().contiguous().t().reshape(-1)
    paths = [save_zip(one, tmp_path / "a.pt"), save_zip(two, tmp_path / "b.pt")]
    data = json.loads(command("diff", *paths, "--json")[1])["tensors"]
    assert [(x["kind"], x["changed"], x["max_abs"]) for x in data] == [
        ("value", 1, 1.0),
        ("identical", 0, None),
    ]


def test_an_unforeseen_error_is_no_difference_and_reaches_no_terminal(
    monkeypatch, tmp_path, capsys
):
    torch.save(torch.nn.BatchNorm2d(2).state_dict(), tmp_path / "a.pt")

    def fail(*_, **__):
        raise RuntimeError("\x1b[31m")

    monkeypatch.setattr("bnfreeze.verification.diff.diff", fail)
    assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "a.pt")]) == 2
    error = capsys.readouterr().err
    assert "a defect of bnfreeze" in error
    assert "Traceback" in error
    assert "\x1b" not in error


def test_checkpoints_without_a_common_name_are_said_to_be_of_different_models(tmp_path, capsys):
    for name in ("a", "b"):
        torch.save({f"{name}.{k}": v for k, v in STATISTICS.items()}, tmp_path / f"{name}.pt")
    assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 1
    assert "No name is in both" in capsys.readouterr().out


def test_a_pattern_that_names_a_tensor_is_pointed_to_its_module(tmp_path, capsys):
    torch.save({f"a.{k}": v for k, v in STATISTICS.items()}, tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt"), "--select", "a.running_mean"]) == 2
    assert "It is a tensor; patterns name modules: 'a'." in capsys.readouterr().err


STATISTICS = {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
