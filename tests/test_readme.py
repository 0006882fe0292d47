"""The README: every example runs, every table agrees with the code, the picture is today's."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnfreeze
from bnfreeze import Policy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = [
    block
    for block in re.findall(r"```python\n(.*?)```", README, re.S)
    if "import torchvision" in block
]


OUTPUTS = dict(re.findall(r"```python\n([^`]*?)```\n\n```text\n([^`]*?)```", README))


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs_and_prints_what_the_readme_shows(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    exec(compile(code, "README.md", "exec"), {})
    if code in OUTPUTS:

        def words(text):  # figures differ a little from one torch to another
            return re.sub(r"[\d.e-]*\d", "#", text).split()

        assert words(capsys.readouterr().out) == words(OUTPUTS[code])


def test_outputs_are_shown():
    assert len(OUTPUTS) == 3


def test_there_are_examples_for_the_recipes():
    assert len(EXAMPLES) >= 7


def test_the_policy_table_agrees_with_the_policies():
    rows = re.findall(r"^\| `([a-z-]+)` \| (\S.*?) \| (\S.*?) \| (\S.*?) \|$", README, re.M)
    told = {
        name: rest for name, *rest in rows if name in {"stats", "affine", "eval", "fused", "none"}
    }
    assert len(told) == 5
    for name, (statistics, normalises, affine) in told.items():
        policy = Policy.parse(name)
        assert (statistics == "held") is policy.freezes_statistics
        assert ("always" in normalises) is policy.forces_eval
        assert affine.startswith("held") is policy.freezes_affine


def test_the_picture_shows_todays_report(tmp_path):
    script = (ROOT / "docs" / "make_pictures.py").read_text()
    code = script.replace("Path(__file__).parent", f"Path({str(tmp_path)!r})")
    subprocess.run([sys.executable, "-c", code], check=True)

    def words(path):
        text = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.S)
        return html.unescape(" ".join(re.findall(r">([^<>]+)</text>", text))).split()

    assert words(ROOT / "docs" / "report.svg") == words(tmp_path / "report.svg")
    assert "held" in words(tmp_path / "report.svg")


def test_the_public_names_in_the_readme_exist():
    for name in set(re.findall(r"bnfreeze\.([a-z_]+)\(", README)):
        assert hasattr(bnfreeze, name)
