"""The pytest plugin, run by pytest in pytest."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import bnfreeze

# Installed, pytest finds the plugin by itself; from a checkout it has to be named.
INSTALLED = "bnfreeze" in {entry.name for entry in entry_points(group="pytest11")}
PLUGIN = () if INSTALLED else ("-p", "bnfreeze.pytest_plugin")
# Hypothesis' plugin would import all of hypothesis again in each run.
PLUGIN += ("-p", "no:hypothesispytest")

HEAD = """
import pytest
import torch
from torch import nn

import bnfreeze


@pytest.fixture
def model():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    bnfreeze.freeze(model)
    return model


def train(model, steps, drift_at=None):
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    for step in range(1, steps + 1):
        model(torch.randn(3, 4)).sum().backward()
        if step == drift_at:
            model[0].running_mean[1] = 5
        optimizer.step()
"""


@pytest.fixture(scope="module")
def torch_loaded():
    """Do once what the tests do: pytester forgets what was imported in it, and torch and its
    parts cannot be imported twice."""
    scope = {}
    exec(HEAD, scope)
    model = scope["nn"].Sequential(scope["nn"].BatchNorm1d(4), scope["nn"].Linear(4, 1))
    bnfreeze.freeze(model)
    str(bnfreeze.verify(model, bnfreeze.snapshot(model)))
    with bnfreeze.guard(model):
        scope["train"](model, 1)


@pytest.fixture
def run(pytester, monkeypatch, torch_loaded):
    monkeypatch.setenv("PYTHONPATH", str(Path(bnfreeze.__file__).parent.parent))

    def run(tests, *options, inside=True):
        pytester.makepyfile(HEAD + tests)
        way = pytester.runpytest_inprocess if inside else pytester.runpytest_subprocess
        return way(*PLUGIN, *options)

    return run


def test_a_drift_fails_the_test_at_the_step_or_at_its_end(run):
    result = run("""
def test_passes(bnfreeze_guard, model):
    watch = bnfreeze_guard(model)
    train(model, 3)
    assert watch.step == 3


def test_step(bnfreeze_guard, model):
    bnfreeze_guard(model)
    train(model, 9, drift_at=2)


def test_end(bnfreeze_guard, model):
    bnfreeze_guard(model, every=2)
    train(model, 2)
    model[0].running_var[0] = 9


def test_second_model(bnfreeze_guard, model):
    other = nn.BatchNorm1d(2)
    bnfreeze_guard(model)
    bnfreeze_guard(other, tensors="norm")
    other(torch.randn(3, 2))


def test_unused(bnfreeze_guard):
    pass
""")
    result.assert_outcomes(failed=3, passed=2)
    result.stdout.fnmatch_lines(["E*0.running_mean drifted at step 2: 1 of 4 elements differs*"])
    result.stdout.fnmatch_lines(["E*0.running_var drifted after step 2:*"])
    result.stdout.fnmatch_lines(["E*running_mean drifted before the first optimizer step*"])


def test_the_failure_of_a_test_is_kept_and_the_drift_is_noted(run):
    result = run("""
def test_it(bnfreeze_guard, model):
    bnfreeze_guard(model)
    model[0].running_var[0] = 9
    assert 1 == 2
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*assert 1 == 2"])
    if sys.version_info >= (3, 11):
        result.stdout.fnmatch_lines(["E*0.running_var drifted*"])


def test_snapshots_that_differ_are_explained_within_eight_lines(run):
    result = run("""
def test_it(model):
    before = bnfreeze.snapshot(model)
    model[0].running_mean[1] = 5
    model[0].running_var[1] = 5
    model[0].bias.requires_grad_()
    assert bnfreeze.snapshot(model) == before
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E*assert the snapshots differ: 3 drifts*",
            "E*0.running_mean drifted: 1 of 4 elements differs*",
            "E*It was written in place*Train under guard(model, trace=True)*",
            "E*And 2 more: 1 × value, 1 × requires-grad.",
        ]
    )
    result.stdout.no_fnmatch_line("*truncated*")
    explained = [line for line in result.stdout.lines if line.startswith("E ")]
    assert len(explained) <= 8


def test_a_report_explains_itself_and_other_comparisons_are_left_to_pytest(run):
    result = run("""
def test_report(model):
    before = bnfreeze.snapshot(model)
    model[0].running_mean[1] = 5
    assert bnfreeze.verify(model, before)


def test_it(model):
    assert bnfreeze.snapshot(model) == 3


def test_that():
    assert [1, 2] == [1, 3]
""")
    result.assert_outcomes(failed=3)
    what = "1 drift*0.running_mean drifted: 1 of 4*It was written in place*"
    result.stdout.fnmatch_lines([f"E*assert <DriftReport: {what}>"])
    result.stdout.fnmatch_lines(["E*assert <Snapshot of 5 tensors (frozen), a copy> == 3"])
    result.stdout.fnmatch_lines(["E*At index 1 diff: 2 != 3"])


def test_only_the_users_frames_are_shown(run):
    result = run("""
@pytest.mark.parametrize("way", ["step", "exit", "check", "trace", "bits", "state"])
def test_it(model, way):
    before = bnfreeze.snapshot(model)
    if way == "state":
        bnfreeze.unfreeze(model)
        bnfreeze.assert_frozen(model)
    with bnfreeze.guard(model, trace=way == "trace") as watch:
        model[0].running_mean[1] = 5
        if way == "step":
            train(model, 1)
        if way == "check":
            watch.check()
        if way == "bits":
            bnfreeze.assert_frozen(model, before)
""")
    result.assert_outcomes(failed=6)
    result.stdout.fnmatch_lines([">*bnfreeze.assert_frozen(model, before)"])
    result.stdout.no_fnmatch_line("*bnfreeze/verification/*")


@pytest.mark.slow
def test_it_works_under_xdist(run):
    result = run(
        """
@pytest.mark.parametrize("drift_at", [None, 1, 2])
def test_it(bnfreeze_guard, model, drift_at):
    bnfreeze_guard(model)
    train(model, 3, drift_at)


def test_equal(model):
    before = bnfreeze.snapshot(model)
    model[0].running_mean[1] = 5
    assert bnfreeze.snapshot(model) == before
""",
        *("-n", "2"),
        inside=False,
    )
    result.assert_outcomes(failed=3, passed=1)
    result.stdout.fnmatch_lines(["E*0.running_mean drifted at step 2:*"])
    result.stdout.fnmatch_lines(["E*the snapshots differ: 1 drift*"])


def test_the_plugin_loads_no_torch():
    code = "import sys, bnfreeze.pytest_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
