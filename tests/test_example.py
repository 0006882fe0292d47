"""The example tells the truth: each row of its table, on a fixed seed and a short run."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "examples" / "finetune_digits.py"

# What each popular recipe lets happen. All of them give another output in eval mode.
STATISTICS_MOVE = (
    "requires_grad=False on buffers",
    "bn.eval() before the loop",
    "optimizer gets the head only",
)
STATISTICS_STAY = ("track_running_stats=False", "momentum=0, affine fixed")
EVAL_POLICIES = ("eval", "eval+affine", "eval+weights, all but the head")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune_digits", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def experiment(example):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield example.run(seed=0, quick=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def outcomes(experiment):
    return {outcome.method: outcome for outcome in experiment.outcomes}


def test_every_way_is_tried_on_all_norm_layers(example, experiment, outcomes):
    assert list(outcomes) == list(example.METHODS)
    assert {outcome.layers for outcome in outcomes.values()} == {9}
    # There is something to lose: the network had learnt the digits, and the shift is real.
    assert experiment.clean_accuracy > 0.8
    assert experiment.shifted_accuracy < experiment.clean_accuracy


def test_every_popular_recipe_fails_in_its_own_way(example, outcomes):
    assert {*STATISTICS_MOVE, *STATISTICS_STAY} == set(example.RECIPES)
    for name in STATISTICS_MOVE:
        assert outcomes[name].broken == ("statistics", "train = eval")
        assert outcomes[name].moved["statistics"] > 0.1
        assert outcomes[name].moved["count"] == 20
    for name in STATISTICS_STAY:
        assert outcomes[name].broken == ("train = eval",)
        assert outcomes[name].gap > 0.1
    assert outcomes["momentum=0, affine fixed"].moved["count"] == 20


def test_recipes_that_change_nothing_train_just_as_if_nothing_were_frozen(outcomes):
    plain = outcomes["nothing frozen"]
    for name in ("requires_grad=False on buffers", "bn.eval() before the loop"):
        assert (outcomes[name].moved, outcomes[name].gap) == (plain.moved, plain.gap)


def test_every_policy_keeps_its_promise_bit_for_bit(example, outcomes):
    assert {name: outcomes[name].broken for name in example.POLICIES} == dict.fromkeys(
        example.POLICIES, ()
    )
    for name in EVAL_POLICIES:
        assert {"statistics", "count", "train = eval"} <= set(outcomes[name].unchanged)
        assert outcomes[name].train_accuracy == outcomes[name].eval_accuracy
    assert {"affine", "convolutions"} <= set(outcomes["eval+weights, all but the head"].unchanged)


def test_recalibrated_layers_are_frozen_like_any_others(example, outcomes):
    for name in example.RECALIBRATED:
        assert outcomes[name].broken == ()
        assert outcomes[name].train_accuracy == outcomes[name].eval_accuracy
    assert "head" in outcomes[example.NOT_TRAINED].unchanged
    assert outcomes[example.NOT_TRAINED].moved["statistics"] == 0  # since it was recalibrated


def test_the_advice_is_not_contradicted_by_the_table(example, experiment, outcomes):
    """On faded images; docs/should-i-freeze.md has the whole runs, for both shifts."""
    assert experiment.layers_shifted > 0
    assert "recalibrate(model" in experiment.advice
    recalibrated = outcomes[example.NOT_TRAINED].eval_accuracy
    assert recalibrated > experiment.shifted_accuracy
    assert "rose" in experiment.advice_scored
    assert recalibrated >= max(outcomes[name].eval_accuracy for name in EVAL_POLICIES)


def test_policies_freeze_nothing_more_than_they_promise(outcomes):
    assert outcomes["stats"].unchanged == ("count", "statistics")
    assert outcomes["affine"].unchanged == ("affine",)
    assert outcomes["eval"].unchanged == ("count", "statistics", "train = eval")
    assert "head" not in outcomes["eval+weights, all but the head"].unchanged


def test_inspect_says_what_then_happens(outcomes):
    for outcome in outcomes.values():
        assert outcome.on_batch == (0 if "train = eval" in outcome.unchanged else 9)
        assert outcome.updating == (0 if {"statistics", "count"} <= set(outcome.unchanged) else 9)
    assert "train-undoes-eval" in outcomes["bn.eval() before the loop"].findings
    assert "stats-not-frozen" in outcomes["optimizer gets the head only"].findings
    for name in STATISTICS_STAY:
        assert "batch-stats-in-train" in outcomes[name].findings


def test_the_same_seed_gives_the_same_outcome(example, experiment):
    torch.manual_seed(3)
    pretrained, data = example.small_resnet(), example.shifted("inverted", *example.digits()[:12])
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(example.fine_tune(pretrained, "eval", data, data, epochs=1))
    assert results[0] == results[1]


@pytest.mark.parametrize("width", [72, 80, 100, 120])
def test_the_table_fits_and_ends_with_what_the_numbers_say(example, experiment, width):
    console = example.Console(file=example.io.StringIO(), width=width, color_system=None)
    console.print(example.picture(experiment, width))
    text = console.file.getvalue()
    assert ("inspect said" in text) is (width >= 100)
    assert "…" not in text
    assert all(f" {method} " in text for method in example.METHODS)
    assert {"5 of 5 popular recipes", "5 of 5 policies"} <= set(
        re.findall(r"\d of \d \w+(?: recipes)?", " ".join(text.split()))
    )


def test_the_command_prints_json_and_saves_a_picture(
    example, experiment, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(example, "run", lambda **_: experiment)
    example.main(["--json", "--svg", str(tmp_path / "table.svg")])
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["outcomes"]) == len(example.METHODS)
    assert printed["conclusion"] == example.conclusion(experiment)
    assert "<svg" in (tmp_path / "table.svg").read_text(encoding="utf-8")
