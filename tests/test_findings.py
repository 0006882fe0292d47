"""The registry of findings: what is emitted is registered, and explained everywhere alike."""

import ast
import importlib.util
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze.errors import BnfreezeError
from bnfreeze.findings import KINDS, PAGES, Finding, finding, finding_kind, worst_first

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "bnfreeze").rglob("*.py"))


def emitted():
    """The codes in the source's calls of `finding`, by the file's name."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "finding":
                yield ast.literal_eval(node.args[0]), path.name


def test_what_is_emitted_is_registered_and_what_is_registered_is_emitted():
    assert {code for code, _ in emitted()} == set(KINDS)


def test_every_page_is_read_whole():
    text = (ROOT / "bnfreeze/findings.md").read_text(encoding="utf-8")
    assert "\n".join(PAGES.values()) == text
    for kind in KINDS.values():
        indented = "\n".join(f"    {line}".rstrip() for line in kind.example.splitlines())
        parts = [kind.code, kind.title, *kind.levels, kind.meaning, kind.why, kind.remedy, indented]
        assert all(parts)
        assert all(part in PAGES[kind.code] for part in parts)


def test_codes_are_unique_and_sorted_and_the_texts_are_plain_ascii():
    assert list(KINDS) == sorted(KINDS)
    for kind in KINDS.values():
        assert PAGES[kind.code].isascii()
        assert set(kind.levels) <= {"error", "warning", "note"}
        assert not kind.title.endswith(".")


def test_a_finding_takes_its_level_and_remedy_from_the_registry():
    made = finding("never-trained", "bn", "seen")
    assert made == Finding("warning", "never-trained", "bn", "seen", made.remedy)
    assert made.remedy == finding_kind("Never-Trained").remedy
    assert finding("optimizer-has-frozen", "bn", level="warning", key="ema").key == "ema"
    with pytest.raises(KeyError):
        finding("no-such-code", "bn")
    with pytest.raises(ValueError, match="warning"):
        finding("never-trained", "bn", level="error")


def test_an_unknown_code_names_the_nearest():
    with pytest.raises(BnfreezeError, match="Did you mean never-trained"):
        finding_kind("never-traind")


def test_the_worst_come_first_and_the_rest_as_they_came():
    a, b, c, d = (Finding(level, "x", n, "", "") for level, n in zip(
        ("note", "warning", "error", "warning"), "abcd", strict=True))  # fmt: skip
    assert worst_first([a, b, c, d]) == (c, b, d, a)


def small():
    """A model in train mode whose statistics are those of no new layer."""
    model = nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(3), flat=nn.Flatten(), fc=nn.Linear(12, 2)))
    model(torch.randn(4, 3, 2, 2) + 1)
    return model


def codes(what):
    return {one.code for one in bnfreeze.inspect(what).findings}


def test_the_remedy_of_rounded_statistics_gives_a_model_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small()
    torch.save(model.state_dict(), "weights.pt")
    exec(KINDS["stats-dtype"].example, {"model": model, "nn": nn, "torch": torch})
    assert "stats-dtype" not in codes(model)
    for mode in (True, False):
        assert model.train(mode)(torch.randn(4, 3, 2, 2).bfloat16()).dtype is torch.bfloat16


def test_the_remedy_of_a_model_that_does_not_train_lets_it_train():
    model = small()
    bnfreeze.freeze(model, "eval+weights")
    assert "model-nothing-trains" in codes(model)
    call = re.search(r"unfreeze\(.+?\)", KINDS["model-nothing-trains"].remedy)
    eval(call[0], {"model": model, "unfreeze": bnfreeze.unfreeze})
    assert "model-nothing-trains" not in codes(model)
    assert model.fc.weight.requires_grad


def test_the_remedy_of_statistics_that_change_names_the_policy_and_not_the_whole_model():
    model = small()
    rules = {"bn": "affine", "fc": "none"}
    (found,) = (f for f in bnfreeze.freeze(model, rules).findings if f.code == "stats-not-frozen")
    after, before = re.findall("'(.+?)'", found.remedy)
    assert rules["bn"] == before
    bnfreeze.freeze(model, rules | {"bn": after})
    assert codes(model) == set()


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_an_export_in_train_mode_is_one(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    scope = {"model": small(), "images": torch.randn(4, 3, 2, 2), "torch": torch}
    exec(KINDS["layer-exported-training"].example, scope)
    assert "layer-exported-training" in codes("model.onnx")


def test_the_pages_of_the_documentation_agree_with_the_registry():
    spec = importlib.util.spec_from_file_location("make_findings", ROOT / "docs/make_findings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stored = {path.name: path.read_text() for path in module.FOLDER.glob("*.md")}
    assert stored == module.pages(), "run: python docs/make_findings.py"
