"""The recipes: every piece of code in docs/recipes.md runs, and every link leads somewhere."""

import contextlib
import io
import re
import sys

import pytest
import torch

from .test_readme import README, ROOT

RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", RECIPES, re.M | re.S)
CODE = [
    pytest.param(code, id=f"{title} {number}")
    for title, text in SECTIONS
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.S), 1)
]


@pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")  # the trainers' own
@pytest.mark.parametrize("code", CODE)
def test_a_recipe_runs(code, tmp_path, monkeypatch):
    packages = re.findall(r"^(?:import|from) (\w+)", code, re.M)
    # Transformers' Trainer has needs of its own.
    for package in [*packages, *(["accelerate"] if "Trainer(" in code else [])]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "docs/recipes.md", "exec"), {"__name__": "recipe"})


@pytest.fixture(autouse=True)
def alone():
    """No process group and no Accelerator is left to the next recipe."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def slug(title):
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_contents_and_the_readme_link_to_each_section():
    anchors = [slug(title) for title, _ in SECTIONS]
    assert re.findall(r"^- \[.*\]\(#(.*)\)$", RECIPES, re.M) == anchors
    assert re.findall(r"\(docs/recipes\.md#([\w-]*)\)", README) == anchors


def test_every_section_but_the_one_in_words_has_code():
    bare = [title for title, text in SECTIONS if "```python" not in text]
    assert bare == ["MMDetection and Ultralytics, in words"]
