"""What a user's own functions leave behind, and layers that must not be touched."""

import copy

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze import CalibrationError, PolicyError, probe, recalibrate
from bnfreeze.calibration.fit import THRESHOLDS

from ..helpers import moved, state
from .test_recalibrate import batches, network


def test_a_score_that_leaves_train_mode_changes_no_measurement():
    data, plain, trained = batches(3, 8, 8), network(), network()

    def score(model):
        model.train()
        return 0.0

    for options in ({}, {"exact": True}):
        recalibrate(plain, data, **options)
        recalibrate(trained, data, score=score, **options)
        assert moved(state(plain), trained) == set()


class Counting(nn.Module):
    """Puts another tensor in the place of its buffer at each call."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.norm(x)


def test_a_buffer_that_is_replaced_is_put_back():
    model = Counting()
    calls = model.calls
    probe(model, batches(3))
    assert model.calls is calls
    assert model.calls == 0


def test_keep_function_leaves_a_frozen_weight_alone():
    model, data = network(), batches(3, 8, 8)
    bnfreeze.freeze(model, {"1": "affine"})
    proof = bnfreeze.snapshot(model)
    assert recalibrate(model, data, mode="keep-function").recalibrated == ("5",)
    assert bnfreeze.verify(model, proof).ok
    assert recalibrate(model, data).recalibrated == ("1", "5")


def test_keep_function_refuses_a_weight_that_a_layer_not_selected_shares():
    tied = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    tied[1].weight = tied[0].weight
    with pytest.raises(PolicyError, match="shares"):
        recalibrate(tied, batches(3), mode="keep-function", select="0")


def test_a_variance_beyond_fp16_is_refused():
    model = nn.BatchNorm1d(3).half()
    before = state(model)
    with pytest.raises(CalibrationError, match="float16"):
        recalibrate(model, [torch.randn(64, 3).mul(2000).half()])
    assert moved(before, model) == set()


def test_instance_norm_of_one_pixel_has_no_variance():
    layer = nn.InstanceNorm2d(3, track_running_stats=True)
    data = batches(3, 1, 1)
    fit = probe(layer, data).layers[0]
    assert (fit.dead_channels, fit.variance_ratio.median) == (0, 1)
    with pytest.raises(CalibrationError, match="in each sample"):
        recalibrate(layer, data)
    assert torch.equal(layer.running_var, torch.ones(3))


def test_one_value_is_no_sign_of_a_dead_channel():
    report = probe(nn.BatchNorm1d(3), [torch.randn(1, 3)])
    assert {finding.code for finding in report.findings} == {"too-few-samples"}
    str(report)


def test_instance_norm_has_no_batch_noise():
    data = [torch.randn(2, 3, 4, 4) + torch.randn(2, 3, 1, 1) for _ in range(256)]
    report = probe(nn.InstanceNorm2d(3, track_running_stats=True), data)
    assert "batch-too-small" not in {finding.code for finding in report.findings}
    str(report)


def test_stored_nan_does_not_fit():
    layer = nn.BatchNorm1d(3)
    layer.running_var.fill_(torch.nan)
    report = probe(layer, batches(3))
    assert report.layers[0].verdict == "shifted"
    assert "recalibrate(" in report.advice
    str(report)


def test_compiled_layers_are_reached():
    model, data = network(), batches(3, 8, 8)
    expected = copy.deepcopy(model)
    recalibrate(expected, data)
    model.compile(backend="eager")
    model(data[0])
    report = recalibrate(model, data)
    assert report.recalibrated == ("1", "5")


def test_layers_left_alone_are_not_blamed_on_the_method():
    model, data = network(), batches(3, 8, 8, sizes=[64, 64])
    bnfreeze.freeze(model, {"1": "eval"})
    model[1].running_mean.fill_(9)
    advice = recalibrate(model, data).advice
    assert "left as they were" in advice
    assert "exact=True" not in advice
    assert "select='**'" in probe(model, data).advice  # the frozen one is off, too


def test_a_frozen_layer_near_the_threshold_is_named_in_the_call():
    layer = nn.BatchNorm1d(3)
    data = [torch.randn(2048, 3) for _ in range(4)]
    recalibrate(layer, data)
    layer.running_mean.add_(THRESHOLDS.mean)
    bnfreeze.freeze(layer, "eval")
    advice = probe(layer, data).advice
    assert "near the threshold" in advice
    assert "select='**'" in advice


def test_the_score_gets_the_module_inside_a_wrapper():
    wrapped = nn.DataParallel(network())
    report = recalibrate(
        wrapped, batches(3, 8, 8), score=lambda model: float(isinstance(model, nn.Sequential))
    )
    assert report.score_before == report.score_after == 1


def test_a_layer_that_merges_its_weights_in_eval_mode_trains_on_as_before():
    class Lora(nn.Linear):
        # As loralib's: what is merged gets no gradient.
        merged = False

        def __init__(self):
            super().__init__(3, 3)
            self.lora = nn.Parameter(torch.full((3, 3), 0.1))

        def train(self, mode=True):
            super().train(mode)
            if mode is self.merged:
                self.weight.data.add_(self.lora, alpha=-1 if mode else 1)
                self.merged = not mode
            return self

        def forward(self, x):
            weight = self.weight if self.merged else self.weight + self.lora
            return nn.functional.linear(x, weight, self.bias)

    model = nn.Sequential(Lora(), nn.BatchNorm1d(3))
    before = state(model)
    probe(model, batches(3))
    assert moved(before, model) == set()
    model(torch.randn(4, 3)).square().sum().backward()
    assert model[0].lora.grad is not None


def test_what_a_forward_makes_of_the_model_stays_and_scripted_parts_get_their_mode_back():
    lazy = nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4))
    probe(lazy, [torch.randn(4, 3, 2, 2)])
    assert (type(lazy[0]), lazy[0].in_channels) == (nn.Conv2d, 3)
    for mode in (True, False):
        model = nn.Sequential(nn.BatchNorm1d(3), torch.jit.script(nn.Dropout())).train(mode)
        probe(model, [torch.randn(8, 3)])
        bnfreeze.inspect(model)
        assert model[1].training is mode


class Once(nn.Module):
    """Calls its second norm layer in the first pass alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.passes = nn.BatchNorm1d(3), nn.BatchNorm1d(3), []

    def forward(self, x):
        self.passes.append(x)
        return self.a(x) if len(self.passes) > 1 else self.b(self.a(x))


@pytest.mark.parametrize("exact", [False, True])
def test_a_layer_that_a_later_pass_does_not_reach_is_an_error(exact):
    model = Once()
    before = state(model)
    with pytest.raises(CalibrationError, match="b: no batch reached it in a later pass"):
        recalibrate(model, [torch.randn(8, 3)], exact=exact)
    assert moved(before, model) == set()
