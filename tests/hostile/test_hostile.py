"""Each hostile file is answered with a clear line and the right exit code; nothing of it runs."""

import re
import subprocess
import sys

import pytest

from tests.checkpoints.formats import safetensors_file
from tests.hostile.commands import Commands
from tests.hostile.files import EVIL, HOSTILE, MARKER, SLOW


@pytest.fixture(scope="module")
def commands():
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture
def look(commands):
    return commands.run


def snapshot(path):
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in HOSTILE],
)
def test_a_hostile_file_is_answered(name, look, tmp_path):
    make, code, words = HOSTILE[name]
    path = make(tmp_path)
    before = snapshot(path)
    done = look("inspect", path, "--json")
    assert done.returncode == code, done.stderr
    assert re.search(words, done.stderr if code == 2 else done.stdout), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith('{\n  "schema": 2')
    assert not (tmp_path / MARKER).exists()
    assert snapshot(path) == before
    if code == 2:
        assert done.stderr.startswith("bnfreeze: ")
        assert done.stderr.count("\n") == 1


def test_the_payload_would_have_run(tmp_path):
    make, _, _ = HOSTILE["os_system_in_the_metadata_of_a_distributed_checkpoint"]
    path = make(tmp_path)
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", code, path / ".metadata"], check=True)
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("form", [(), ("--plain",), ("--json",)])
def test_a_hostile_name_is_shown_and_never_obeyed(look, form, tmp_path):
    path = HOSTILE["a_name_that_is_markup_and_escape_sequences"][0](tmp_path)
    done = look("inspect", path, *form, "--svg", tmp_path / "a.svg", "--html", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    assert "layer[/foo][bold]" in done.stdout.replace("\n", "").replace(" ", "")
    texts = [done.stdout, (tmp_path / "a.svg").read_text(), (tmp_path / "a.html").read_text()]
    for text in texts:
        assert not set("\x1b\x07\r\u202e\u2066") & set(text)
    assert EVIL not in texts[0]


def test_a_refused_diff_says_which_file(look, tmp_path):
    first = HOSTILE["a_dict_that_holds_itself"][0](tmp_path)
    (tmp_path / "other").mkdir()
    second = HOSTILE["os_system_in_a_plain_pickle"][0](tmp_path / "other")
    done = look("diff", first, second)
    assert done.returncode == 2
    assert str(second) in done.stderr
    assert "posix.system" in done.stderr


def test_diff_does_not_count_to_a_trillion(look, tmp_path):
    path = HOSTILE["stride_0_and_a_shape_of_a_trillion"][0](tmp_path)
    done = look("diff", path, path)
    assert done.returncode == 2
    assert "Refused: its tensors claim 8,000,000,000,000 bytes" in done.stderr


def test_diff_does_not_compare_the_same_bytes_without_end(look, tmp_path):
    import torch

    whole = torch.zeros(10_000_000)
    state = {f"n{i}": whole for i in range(2_000)}
    # Views of one storage under a name each; torch.save keeps them apart.
    torch.save({name: value[:] for name, value in state.items()}, tmp_path / "a.pt")
    done = look("diff", tmp_path / "a.pt", tmp_path / "a.pt")
    assert done.returncode == 2
    assert "its tensors claim 80,000,000,000 bytes, and their storages have 40" in done.stderr


def test_a_table_of_three_thousand_layers_is_cut(look, tmp_path):
    import torch

    one = torch.ones(1)
    state = {f"l{i}.{part}": one for i in range(3_000) for part in ("running_mean", "running_var")}
    torch.save(state, tmp_path / "a.pt")
    done = look("inspect", tmp_path / "a.pt")
    assert done.returncode == 0, done.stderr
    assert "1,000 rows more" in done.stdout
    assert "3000 norm layers" in done.stdout


def test_a_wrong_pattern_does_not_list_every_name_above_every_name(look, tmp_path):
    header = {
        f"{i}.{'.'.join('a' * 500)}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        for i in range(8_000)
    }
    path = safetensors_file(tmp_path / "a.safetensors", header)
    done = look("inspect", path, "--select", "backbone")
    assert done.returncode == 2, done.stderr
    assert "Pattern 'backbone' matches nothing in it." in done.stderr
