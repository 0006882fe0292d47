"""The benchmarks: the command runs, and every arm computes what it should."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torchvision.models import resnet

from benchmarks import __main__ as command
from benchmarks import arms, peers, picture, report, runs
from benchmarks.facts import BASE, Record, Run, quartiles, ratios
from benchmarks.measure import Effort, in_turns
from benchmarks.setting import Setting
from benchmarks.work_layer import shapes, trained_norm
from benchmarks.work_model import calibrated

PLAIN = [arm for arm in arms.ARMS if arm.compiled is None]
INDUCTOR = next(arm for arm in arms.ARMS if arm.name.endswith("conv_bn_eval pass"))


def named(chosen):
    """The arms as parameters of a test; one whose library is not installed is skipped."""
    return [
        pytest.param(
            arm,
            id=arm.name,
            marks=pytest.mark.skipif(peers.is_absent(arm.peer), reason=f"{arm.peer} is absent"),
        )
        for arm in chosen
    ]


@pytest.fixture(scope="module")
def block():
    return calibrated(resnet.Bottleneck(16, 4), (4, 16, 6, 6))


@pytest.fixture(scope="module")
def network():
    return calibrated(resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]), (4, 3, 64, 64))


def close(one, other):
    return torch.linalg.norm(one - other) <= 1e-4 * torch.linalg.norm(other)


@pytest.mark.parametrize("arm", named(PLAIN))
def test_a_frozen_arm_computes_in_training_what_eval_mode_does(arm, block, network):
    for live, x in ((block, torch.randn(4, 16, 6, 6)), (network, torch.randn(4, 3, 64, 64))):
        model, evaluated = arm.model(live), copy.deepcopy(live).eval()
        assert close(model(x), evaluated(x)) == arm.frozen


@pytest.mark.parametrize("arm", named(arm for arm in PLAIN if arm.frozen))
def test_a_frozen_arm_has_the_gradients_of_eval_mode(arm, block):
    x = torch.randn(4, 16, 6, 6)
    model, evaluated = arm.model(block), copy.deepcopy(block).eval()
    gradients = []
    for one in (model, evaluated):
        leaf, convolution = x.clone().requires_grad_(), getattr(one.conv2, "conv", one.conv2)
        # Folded once, the weight cannot train; the arm is not measured where it does.
        wanted = [leaf] if arm.needs_frozen_weights else [leaf, convolution.weight]
        gradients.append(torch.autograd.grad(one(leaf).square().sum(), wanted))
    assert all(close(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("arm", named(arm for arm in PLAIN if arm.alone and arm.frozen))
@pytest.mark.parametrize("follow", arms.FOLLOWS)
def test_a_layer_computes_the_operations_after_it(arm, follow):
    live, x, residual = trained_norm(6), torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)
    expected = copy.deepcopy(live).eval()(x)
    if follow == "add+relu":
        expected = expected + residual
    if follow != "nothing":
        expected = expected.relu()
    assert close(arm.layer(live, follow)(x, residual), expected)


def test_an_arm_does_not_change_the_model_that_it_copies(block):
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    kinds = [type(module) for module in block.modules()]
    for arm in PLAIN:
        if not peers.is_absent(arm.peer):
            arm.model(block)
    assert kinds == [type(module) for module in block.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


@pytest.mark.slow  # compiles C++ without a cache
def test_the_pass_of_inductor_removes_the_norm_layer(tmp_path, monkeypatch):
    live = nn.Sequential(nn.Conv2d(3, 6, 1), trained_norm(6))
    x = torch.randn(2, 3, 4, 4)
    counters.clear()
    # A graph from the cache does not go through the pass again.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch.no_grad():
        out = INDUCTOR.ready(INDUCTOR.model(live))(x)
    assert counters["inductor"]["efficient_conv_bn_eval"] == 1
    assert close(out, copy.deepcopy(live).eval()(x))


@pytest.mark.slow  # compiles a dozen times
@pytest.mark.parametrize("arm", named(arm for arm in arms.ARMS if arm.compiled is not None))
def test_a_compiled_arm_computes_the_same(arm, block):
    model, x = arm.model(block), torch.randn(4, 16, 6, 6)
    expected = copy.deepcopy(model)(x)
    out = arm.ready(model)(x)
    out.sum().backward()
    assert close(out, expected)


def test_the_shapes_are_those_of_the_norm_layers_of_a_resnet50():
    assert sum(shapes().values()) == 53
    assert len(shapes()) == 12
    assert sum(count * c * h * h for (c, h), count in shapes().items()) == 11_113_984


def measured(path, *works):
    """Run the command on toy models, without mmengine; return its exit code and the run."""
    home = peers.HOMES["mmengine"]
    peers.HOMES["mmengine"] = ("a_module_that_nobody_has", "")
    peers.find.cache_clear()
    try:
        code = command.main([*works, "--tiny", "--device", "cpu", "--json", str(path)])
    finally:
        peers.HOMES["mmengine"] = home
        peers.find.cache_clear()
    return code, runs.load(path)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The file of a run of two works, and the run."""
    path = tmp_path_factory.mktemp("benchmarks") / "quick.json"
    code, run = measured(path, "block", "memory")
    assert code == 0
    return path, run


@pytest.mark.slow
def test_every_work_is_measured_and_nothing_fails(tmp_path):
    code, run = measured(tmp_path / "tiny.json")
    assert code == 0
    assert not [note for note in run.notes if "failed" in note]
    assert {one.work for one in run.records} == set(command.WORKS)
    assert {one.unit for one in run.records} == {"x", "MiB", "%"}


def test_the_json_has_the_machine_and_finite_figures(quick):
    facts = json.loads(quick[0].read_text())
    assert facts["schema"] == 1
    assert facts["device"].keys() == {"kind", "name", "threads"}
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["commit"]
    for one in facts["tables"]:
        assert one.keys() == {"work", "case", "unit", "base", "arms"}
        assert one["unit"] in {"x", "MiB"}
        for arm, (median, low, high, rounds) in one["arms"].items():
            assert math.isfinite(median)
            assert low <= median <= high
            assert rounds >= 1
            if one["unit"] == "x":
                assert arm != one["base"] or median == 1


def test_every_installed_arm_is_measured_and_an_absent_one_is_named(quick):
    run = quick[1]
    installed = {
        arm.name for arm in PLAIN if arm.peer != "mmengine" and not peers.is_absent(arm.peer)
    }
    assert installed <= {one.arm for one in run.records}
    assert not [one for one in run.records if "MMEngine" in one.arm]
    assert "ModuleNotFoundError" in run.absent["mmengine"]
    assert any(line.startswith("mmengine is absent") for line in report.about(run))


def test_the_committed_runs_become_a_page_and_a_picture():
    files = [runs.HERE / "results" / name for name in ("cpu.json", "host.json")]
    page = report.page(files)
    headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert headings.count(report.TITLES["host"]) == 1  # it is in both files
    shown = {heading.partition(":")[0] for heading in headings}
    assert {report.TITLES["step"], report.TITLES["host"]} < shown <= set(report.TITLES.values())
    assert page.count(f"\n| {BASE} | 1 |") > 20
    assert picture.steps(runs.load(files[0])).count("bnfreeze fused-act") == 1


def test_a_run_can_be_saved_and_loaded(tmp_path):
    records = [
        Record("step", {"precision": "bf16"}, "an arm", "x", 0.9, 0.8, 1.0, 5, BASE),
        Record("step", {"precision": "bf16"}, "another", "x", 0.8, 0.7, 0.9, 5, BASE),
        Record("memory", {"precision": "bf16"}, "an arm", "MiB", 20.5, 20.5, 20.5, 1),
    ]
    run = Run("python -m benchmarks", {"kind": "cpu"}, {"torch": "2"}, "abc", {}, records, ["note"])
    runs.save(run, tmp_path / "run.json")
    assert runs.load(tmp_path / "run.json") == run


def test_ratios_are_paired_round_by_round():
    times = {BASE: [1.0, 10.0, 2.0], "another": [2.0, 20.0, 4.0]}
    base, other = ratios("step", {}, times, BASE)
    assert (base.median, base.low, base.high) == (1, 1, 1)
    assert (other.median, other.low, other.high) == (2, 2, 2)
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)
    assert quartiles([7]) == (7, 7, 7)


def test_each_round_gives_every_arm_its_turn():
    calls = []
    samplers = {name: (lambda name=name: calls.append(name) or 1.0) for name in "abc"}
    times = in_turns(samplers, Effort(rounds=8, seconds=60.0))
    rounds = [tuple(calls[begin : begin + 3]) for begin in range(0, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds[1:])) > 1  # in changing order
    assert [len(column) for column in times.values()] == [8, 8, 8]


def test_the_fastest_turn_of_a_round_counts():
    spent = iter([9.0, 5.0, 3.0, 4.0, 8.0, 7.0, 6.0])  # the first of them warms up
    times = in_turns({"a": lambda: next(spent)}, Effort(rounds=2, seconds=60.0, turns=3))
    assert times == {"a": [3.0, 6.0]}


def test_an_arm_that_fails_is_left_out_and_named():
    setting = Setting(torch.device("cpu"))

    def fails():
        raise RuntimeError("no such kernel\nand much more")

    assert setting.prepared({"good": lambda: 7, "bad": fails}, "here") == {"good": 7}
    assert setting.notes == ["bad failed here and was left out: RuntimeError: no such kernel"]


def test_arms_are_chosen_by_a_part_of_their_name_and_the_base_always():
    chosen = [arm.name for arm in arms.choose(["fused-act"])]
    assert chosen == [BASE, "bnfreeze fused-act", "compile: bnfreeze fused-act"]
    assert len({arm.name for arm in arms.ARMS}) == len(arms.ARMS)


def test_a_wrong_work_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["layers"])
    assert "layers" in capsys.readouterr().err


def test_the_batch_norm_layers_of_the_live_arm_train(block):
    live = next(arm for arm in PLAIN if not arm.frozen).model(block)
    before = live.bn1.running_mean.clone()
    live(torch.randn(4, 16, 6, 6))
    assert not torch.equal(live.bn1.running_mean, before)
    assert isinstance(live.bn1, nn.BatchNorm2d)
