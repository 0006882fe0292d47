"""The documents: every example runs, every link leads somewhere, the words are plain."""

import contextlib
import html
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze.checkpoints import limits

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
README = PAGES["README.md"]
BLOCK = re.compile(r"^(?:<!-- (fragment|slow) -->\n)?```python\n(.*?)^```", re.M | re.S)
EXAMPLES = [
    pytest.param(
        page, code, id=f"{page} {number}", marks=[pytest.mark.slow] if marker == "slow" else []
    )
    for page, text in PAGES.items()
    for number, (marker, code) in enumerate(BLOCK.findall(text), 1)
    if marker != "fragment"
]


@pytest.fixture
def alone():
    """No process group and no Accelerator is left to the next example."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")  # the trainers' own
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_an_example_runs(page, code, tmp_path, monkeypatch):
    # Of others the very modules: mmengine.runner needs OpenCV, mmengine does not.
    packages = re.findall(r"^(?:import|from) (bnfreeze(?=\W)|[\w.]+)", code, re.M)
    # Transformers' Trainer needs accelerate.
    for package in [*packages, *(["accelerate"] if "Trainer(" in code else [])]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    # torch.fx and inspect look for the source of a class in its file.
    file = tmp_path / "example.py"
    file.write_text(code, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, str(file), "exec"), {"__name__": "example"})


def test_the_examples_are_found():
    assert len(EXAMPLES) > 25


def slug(title):
    """The anchor that a heading gets, on GitHub and in the site."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_the_project_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), target


# The left column of the project's list of words: a private vocabulary, and turns that are hard.
HARD = [
    r"held",
    r"absorb\w*",
    r"vouch\w*",
    r"told",
    r"proofs?",
    r"cannot be had",
    r"past autograd",
    r"comput\w+ along",
    r"steps? aside",
    r"is another",
    r"whoever",
    r"no longer so",
    r"be it",
    r"but for",
    r"in the midst of",
]


@pytest.mark.parametrize("page", PAGES)
def test_the_words_are_plain(page):
    # What the command prints is not the page's prose.
    text = re.sub(r"^```text\n.*?^```", "", PAGES[page], flags=re.M | re.S)
    assert re.findall(rf"\b(?:{'|'.join(HARD)})\b", text, re.I) == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_the_readme_has_the_two_commands_on_one_line_each():
    lines = README.splitlines()
    examples = [line for line in lines if line.startswith("python3 -m venv .venv ")]
    tests = [line for line in lines if line.startswith("python3 -m venv .venv-test ")]
    assert [line.split()[-1] for line in examples] == ["examples/finetune_digits.py"]
    assert [line.endswith(" -m pytest -n 2") for line in tests] == [True]


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_policy_table_says_what_the_policies_do(page):
    rows = re.findall(r"^\| `([a-z-]+)` \| (\S.*?) \| (\S.*?) \| (\S.*?) \|$", PAGES[page], re.M)
    names = [name for name, *_ in rows]
    assert names == ["stats", "affine", "eval", "fused", "fused-act", "folded", "weights", "none"]
    for name, statistics, normalises, affine in rows:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        if name != "none":
            bnfreeze.freeze(model, name)
        (layer,) = bnfreeze.inspect(model).layers
        assert layer.updates_statistics == (statistics != "frozen"), name
        assert (layer.normalizes_with == "running") == ("always" in normalises), name
        assert layer.trains_affine == (not affine.startswith("frozen")), name


def test_names_in_the_documents_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"(?<![\w./])bnfreeze\.([A-Za-z]\w*)(?![\w/.])", text):
            assert hasattr(bnfreeze, name), (page, name)


def test_the_reference_has_every_public_name():
    listed = set(re.findall(r"\w+", PAGES["docs/api.md"]))
    assert [name for name in bnfreeze.__all__ if name not in listed] == []


def test_the_page_on_architecture_names_files_that_exist():
    paths = re.findall(r"`([a-z_/]+\.(?:py|cu|md))`", PAGES["docs/architecture.md"])
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "bnfreeze" / path).exists(), path


def test_the_limits_are_those_of_the_readers():
    for number in (
        limits.MAX_TENSORS,
        limits.MAX_RECORDS,
        limits.MAX_OPCODES,
        limits.MAX_NAME_LENGTH,
        limits.MAX_NESTING,
        limits.MAX_DIMENSIONS,
        limits.MAX_CHANNELS,
        limits.MAX_DICTS,
    ):
        assert re.search(rf"\b{number:,}\b", PAGES["SECURITY.md"]), number
    for number in (limits.MAX_PICKLE_BYTES, limits.MAX_HEADER_BYTES):
        assert f"{number >> 20} MiB" in PAGES["SECURITY.md"]


def test_the_tools_have_the_same_versions_everywhere():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    workflows = ROOT / ".github" / "workflows"
    assert f"rev: v{re.search(r'ruff~=([0-9.]+)', project)[1]}\n" in hooks
    for needed in re.findall(r'"(mkdocs[^"]*~=[^"]*)"', project):
        assert f"'{needed}'" in (workflows / "docs.yml").read_text(encoding="utf-8")
    tests = (workflows / "tests.yml").read_text(encoding="utf-8")
    for package in ("torch", "torchvision"):
        assert f"'{package}=={re.search(rf'{package}>=([0-9.]+)', project)[1]}.*'" in tests
    assert re.search(r"python: \[(.*)\]", tests)[1] == ", ".join(
        f'"{version}"' for version in re.findall(r"Python :: (3\.\d+)", project)
    )


@pytest.mark.slow
def test_the_picture_shows_todays_report(tmp_path):
    script = (ROOT / "docs" / "make_pictures.py").read_text(encoding="utf-8")
    code = script.replace("Path(__file__).parent", f"Path({str(tmp_path)!r})")
    subprocess.run([sys.executable, "-c", code], check=True)

    def words(path):
        text = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.S)
        return html.unescape(" ".join(re.findall(r">([^<>]+)</text>", text))).split()

    assert words(ROOT / "docs" / "report.svg") == words(tmp_path / "report.svg")
