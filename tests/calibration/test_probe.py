"""probe: what it says of data that fit, of data that do not, and of too few."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import bnfreeze
from bnfreeze import CalibrationError, PolicyError, probe
from bnfreeze.calibration import moments
from bnfreeze.calibration.batches import samples_in
from bnfreeze.calibration.fit import THRESHOLDS

C = 16


def layer(mean=0.0, var=1.0, **options):
    """A layer whose stored statistics fit standard normal data, if nothing else is said."""
    norm = nn.BatchNorm2d(C, **options)
    norm.running_mean.fill_(mean)
    norm.running_var.fill_(var)
    norm.num_batches_tracked.fill_(100)
    return norm


def samples(count, seed=0, level=0.5):
    """Samples whose level differs, as images' do: their means scatter by `level` σ."""
    make = torch.Generator().manual_seed(seed)
    levels = level * torch.randn(count, C, 1, 1, generator=make)
    pixels = torch.randn(count, C, 4, 4, generator=make) * (1 - level**2) ** 0.5
    return list((levels + pixels).split(32))


def verdict(norm, data):
    return probe(norm, data).layers[0].verdict


def test_verdicts():
    many, few = samples(2048), samples(8)
    assert verdict(layer(), many) == "fits"
    assert verdict(layer(mean=0.5), many) == "shifted"
    assert verdict(layer(mean=-0.5), many) == "shifted"
    assert verdict(layer(var=0.4), many) == "shifted"
    assert verdict(layer(var=3.0), many) == "shifted"
    assert verdict(layer(), few) == "uncertain"
    assert verdict(layer(mean=5.0), samples(32)) == "shifted"
    assert verdict(layer(mean=THRESHOLDS.mean), many) == "uncertain"


class TrainsAlways(nn.Sequential):
    """Its own train() leaves its layers in train mode, even after eval(): Detectron.pytorch#104."""

    def train(self, mode=True):
        self.training = mode
        return self


def test_a_layer_that_eval_leaves_in_train_mode_is_compared_with_what_is_stored():
    model = TrainsAlways(layer(mean=0.5)).eval()
    assert model[0].training
    found = probe(model, samples(2048)).layers[0]
    assert (found.verdict, found.origin) == ("shifted", "own")
    assert model[0].training


def test_one_odd_channel_in_many_makes_no_shift_and_two_do():
    norm = layer()
    norm.running_mean[3] = 2.0
    report = probe(norm, samples(2048))
    assert report.layers[0].shifted_channels == 1
    assert report.layers[0].verdict == "shifted"  # 1 of 16 is more than 5 %
    wide = nn.BatchNorm2d(40)
    wide.running_mean[3] = 2.0
    data = [x.repeat(1, 3, 1, 1)[:, :40] for x in samples(2048)]
    assert verdict(wide, data) == "fits"  # 1 of 40, and the intervals are narrow
    wide.running_mean[4:7] = 2.0
    assert verdict(wide, data) == "shifted"


def test_the_numbers_of_a_layer():
    report = probe(layer(mean=1.0, var=4.0), samples(2048, level=0.6))
    fit = report.layers[0]
    assert (fit.name, fit.kind, fit.policy, fit.channels) == ("", "BatchNorm2d", "none", C)
    assert (fit.samples, fit.batch_size, report.batches) == (2048, 32, 64)
    assert fit.mean_shift.median == pytest.approx(0.5, abs=0.02)
    assert fit.mean_shift.largest == pytest.approx(0.5, abs=0.05)
    assert fit.variance_ratio.median == pytest.approx(0.25, abs=0.02)
    # The samples' own means scatter by √(0.36 + 0.64/16) of the data's σ, half the stored one.
    scatter = (0.36 + 0.64 / 16) ** 0.5 / 2
    assert fit.batch_noise == pytest.approx(scatter / 32**0.5, rel=0.1)
    assert fit.standard_error == pytest.approx(scatter / 2048**0.5, rel=0.1)
    assert 3 < fit.margin / fit.standard_error < 4
    assert len(fit.shifts) == 11
    assert fit.shifts[0] <= fit.shifts[5] <= fit.shifts[10] < 0


def codes(report):
    return {finding.code for finding in report.findings}


def test_findings():
    assert codes(probe(layer(), samples(2048, level=0.1))) == set()
    assert codes(probe(layer(mean=1.0), samples(2048))) == {"stats-shifted"}
    assert "too-few-samples" in codes(probe(layer(), samples(8)))
    assert "too-few-samples" in codes(probe(layer(), [torch.randn(1, C, 4, 4)]))
    small = [part for x in samples(512) for part in x.split(2)]
    assert codes(probe(layer(), small)) == {"batch-too-small"}
    for policy, noisy in (("affine", True), ("stats", True), ("eval", False), ("fused", False)):
        frozen = layer()
        bnfreeze.freeze(frozen, policy)
        assert ("batch-too-small" in codes(probe(frozen, small))) is noisy
    dead = [x * (torch.arange(C) != 2).view(C, 1, 1) for x in samples(256)]
    report = probe(layer(), dead)
    assert "dead-on-this-data" in codes(report)
    assert report.layers[0].dead_channels == 1
    assert "1 channel with no signal" in bnfreeze.recalibrate(layer(), dead).advice
    assert "no signal" not in bnfreeze.recalibrate(layer(), samples(256)).advice


ROWS = {
    "one after another": lambda norm, x: norm(x.repeat_interleave(8, 0)),
    "apart": lambda norm, x: norm(x.repeat(8, 1, 1, 1)),
    "in several calls": lambda norm, x: [norm(x) for _ in range(8)],
    "a few in each call": lambda norm, x: [norm(part) for part in x.split(5)],
}


@pytest.mark.parametrize("forward", ROWS.values(), ids=ROWS)
def test_several_rows_of_one_sample_count_once(forward):
    """As frames of a video do, tokens of an image, or the levels that one head is run on."""
    data = samples(64)
    once, found = probe(layer(), data), probe(layer(), data, forward=forward)
    assert found.samples == 64
    (one,), (several,) = once.layers, found.layers
    assert (several.samples, several.batch_size) == (64, 32)
    assert several.standard_error == pytest.approx(one.standard_error)
    assert several.margin == pytest.approx(one.margin)
    assert several.batch_noise == pytest.approx(one.batch_noise)


ALL_AS_ONE = {
    "regions": lambda norm, x: norm(torch.cat([x.repeat_interleave(8, 0), x[:3]])),
    "a call for each": lambda norm, x: [norm(each.expand(64, *each.shape)) for each in x],
    "a short call for each": lambda norm, x: [norm(each.expand(5, *each.shape)) for each in x],
    "regions in several calls": lambda norm, x: [norm(torch.cat([x, x[:k]])) for k in (1, 2, 3)],
}


@pytest.mark.parametrize("forward", ALL_AS_ONE.values(), ids=ALL_AS_ONE)
def test_rows_of_which_the_sample_is_not_known_count_as_one_for_each_batch(forward):
    found = probe(layer(), samples(128), forward=forward)
    assert found.samples == 4
    assert found.layers[0].verdict == "uncertain"


def test_the_size_of_a_batch_is_not_that_of_a_layer_for_regions():
    def forward(model, x):
        model[0](torch.cat([x.repeat_interleave(8, 0), x[:1]]))
        model[1](x)

    small = [part for x in samples(512) for part in x.split(2)]
    model = nn.Sequential(layer(), layer())
    for policy in ("none", "eval"):
        bnfreeze.freeze(model, {"1": policy})
        report = probe(model, small, forward=forward)
        (found,) = report.findings
        assert found.message.startswith("with batches of 2, ")
        assert "the noise of batches of 2." in report.advice


def test_samples_that_are_too_many_to_keep_count_as_one_for_each_batch(monkeypatch):
    monkeypatch.setattr(moments, "_MOST_KEPT", 0)
    for forward, expected in ((ROWS["a few in each call"], 128), (ROWS["in several calls"], 4)):
        assert probe(layer(), samples(128), forward=forward).samples == expected


def test_a_batch_whose_only_tensor_is_empty():
    data = [(SimpleNamespace(tensors=x), torch.zeros(0)) for x in samples(64)]
    assert probe(layer(), data, forward=lambda norm, batch: norm(batch[0].tensors)).samples == 64


def test_frames_of_a_few_videos_do_not_show_a_shift():
    """As 512 samples, they made a layer that fits ``shifted`` in 9 of 10 cases."""
    make = torch.Generator().manual_seed(0)
    for _ in range(10):
        videos = 0.9 * torch.randn(32, 1, C, 1, 1, generator=make)
        frames = videos + 0.43 * torch.randn(32, 16, C, 4, 4, generator=make)
        model = nn.Sequential(nn.Flatten(0, 1), layer())
        assert verdict(model, frames.split(4)) == "uncertain"


def test_how_many_samples_a_batch_has():
    x, y = torch.zeros(8, 3, 4, 4), torch.zeros(8)
    image = x[0]
    for batch in (
        x,
        (x, y),
        {"length": torch.tensor(5), "image": x},
        {"path": ["a"] * 8, "label": y},
        ((image,) * 8, ({"boxes": torch.zeros(2, 4)},) * 8),
        [{"image": image}] * 8,
        [(image, 1)] * 8,
        ((x, x), y),
        (SimpleNamespace(tensors=x), y),
    ):
        assert samples_in(batch) == 8
    assert samples_in([torch.zeros(1, 50, 3), torch.zeros(1), torch.zeros(1)]) == 1
    for few in (1, 2, 8):  # an image has three channels
        images, targets = [image] * few, [{"boxes": torch.zeros(2, 4)}] * few
        assert samples_in((images, targets)) == samples_in((tuple(images), tuple(targets))) == few
    assert samples_in(SimpleNamespace(tensors=x)) is None
    assert samples_in([]) is None


def test_more_samples_as_advised_are_enough():
    report = probe(layer(), samples(24))
    needed = report.layers[0].samples_needed
    assert report.layers[0].verdict == "uncertain"
    assert 100 < needed < 2000
    assert verdict(layer(), samples(needed, seed=1)) == "fits"


def test_what_few_samples_advise_is_no_wild_guess():
    """Student's t of two samples is in the thousands, which asked for up to a billion samples."""
    needed = [probe(layer(), samples(count)).layers[0].samples_needed for count in (2, 3, 8, 64)]
    assert all(100 < some < 2000 for some in needed), needed
    assert probe(layer(), samples(1)).layers[0].samples_needed == 0


def test_advice_names_the_call():
    assert "freeze(model, 'eval+affine')" in probe(layer(), samples(2048)).advice
    kept = layer()
    bnfreeze.freeze(kept, "eval")
    assert "keep them frozen" in probe(kept, samples(2048)).advice
    advice = probe(layer(mean=1.0), samples(2048)).advice
    assert "recalibrate(model" in advice
    assert "likely to mend it" in advice
    frozen = layer(mean=1.0)
    bnfreeze.freeze(frozen, "eval")
    assert "select='**'" in probe(frozen, samples(2048)).advice
    assert "too few" in probe(layer(), samples(8)).advice
    assert probe(layer(), samples(2048))


class Tower(nn.Module):
    """Four layers, each with its own mixing of the channels before it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(4))
        self.bn = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(4))

    def forward(self, x):
        for mix, bn in zip(self.mix, self.bn, strict=True):
            x = bn(mix(x)).relu()
        return x


def test_where_a_shift_starts():
    data = samples(512)
    model = Tower()
    bnfreeze.recalibrate(model, data, exact=True)
    assert probe(model, data).ok
    # Contrast that is lost is mended by the first layer; channels in another order are not.
    faded = probe(model, [x * 0.4 for x in data])
    assert {fit.verdict for fit in faded.layers} == {"shifted"}
    assert [fit.origin for fit in faded.layers] == ["own", *["carried"] * 3]
    assert [f.level for f in faded.findings] == ["warning", *["note"] * 3]
    assert "starts in bn.0" in faded.advice
    once = probe(model, iter([x * 0.4 for x in data]))
    assert {fit.origin for fit in once.layers} == {""}
    assert "recalibrate(model" in once.advice
    for layer in model.mix:  # as if the features were others
        nn.init.normal_(layer.weight)
    other = probe(model, data)
    assert [fit.origin for fit in other.layers] == ["own"] * 4
    assert "unlikely to be enough" in other.advice
    # A selection is judged with all layers normalising.
    part = probe(model, data, select="bn.3")
    assert [fit.origin for fit in part.layers] == ["own"]


def test_reports_print_at_80_columns_and_give_json_html_and_svg(tmp_path):
    model = nn.ModuleDict({f"block{i}": nn.ModuleDict({"bn": layer(i)}) for i in range(5)})
    model["unused"] = layer()

    def forward(m, x):
        for i in range(5):
            m[f"block{i}"]["bn"](x)

    report = probe(model, samples(64), forward=forward)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "not reached" in text
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [x["verdict"] for x in data["layers"]] == [
        "uncertain", *["shifted"] * 4, "not reached",
    ]  # fmt: skip
    assert data["layers"][1]["mean_shift"]["median"] == pytest.approx(1.0, abs=0.2)
    report.save_svg(tmp_path / "probe.svg")
    assert "<svg" in (tmp_path / "probe.svg").read_text()
    assert "shifted" in report._repr_html_()
    one = probe(layer(), [torch.randn(1, C, 4, 4)])
    json.dumps(one.to_dict(), allow_nan=False)
    str(one)


class Taking(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        return self.bn(x)


def test_batches_as_data_loaders_give_them():
    x, labels = torch.randn(6, 3), torch.zeros(6)
    for batch in (
        x,
        (x, labels),
        [x, labels],
        {"labels": labels, "pixel_values": x},
        {"image": x},
        {"inputs": x},
    ):
        assert probe(Taking(), [batch]).samples == 6
    report = probe(Taking(), [SimpleNamespace(x=x)], forward=lambda m, b: m(b.x))
    assert report.samples == 6
    with pytest.raises(TypeError, match="'tokens'"):
        probe(Taking(), [{"tokens": x}])
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        probe(Taking(), x)
    with pytest.raises(TypeError, match="iterable"):
        probe(Taking(), 3)
    for empty in ({}, ()):
        with pytest.raises(TypeError, match="a batch is empty"):
            probe(Taking(), [empty])


@pytest.mark.parametrize("call", [probe, bnfreeze.recalibrate])
@pytest.mark.parametrize(
    ("batch", "taken"),
    [
        ([{"image": torch.zeros(3)}], "first item of the batch, an object of the class dict"),
        (([torch.zeros(4, 3)] * 2, 0), "a list whose first item is a tensor of torch.float32"),
        (torch.zeros(4, 3, dtype=torch.uint8), "a tensor of torch.uint8 with the shape (4, 3)"),
        (torch.zeros(4, 5), "a tensor of torch.float32 with the shape (4, 5)"),
    ],
)
def test_where_the_model_fails_on_a_batch_the_error_names_forward(call, batch, taken):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the note is what is tested
            call(Taking(), [batch] * 2)
    # Before Python 3.11 exceptions have no notes.
    (note,) = getattr(caught.value, "__notes__", None) or [str(w.message) for w in warned]
    assert taken in note
    assert "forward=" in note


def test_what_a_forward_of_the_users_own_raises_gets_no_note():
    with pytest.raises(ZeroDivisionError) as caught:
        probe(Taking(), [torch.zeros(4, 3)], forward=lambda model, batch: 1 / 0)
    assert not hasattr(caught.value, "__notes__")


def test_one_shot_iterators_serve_one_pass_only():
    data = [torch.randn(4, 3) for _ in range(5)]
    assert probe(Taking(), iter(data)).batches == 5
    with pytest.raises(TypeError, match="only once"):
        bnfreeze.recalibrate(Taking(), iter(data))


def test_max_batches_and_progress():
    data, told = [torch.randn(4, 3) for _ in range(5)], []
    report = probe(Taking(), data, max_batches=3, progress=lambda *x: told.append(x))
    assert report.batches == 3
    assert told == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    bnfreeze.recalibrate(Taking(), data, progress=lambda *x: told.append(x), exact=True)
    assert told[-1] == (15, 15)
    probe(Taking(), data, progress=True)  # no terminal, so nothing is shown
    with pytest.raises(ValueError, match="max_batches"):
        probe(Taking(), data, max_batches=0)
    with pytest.raises(bnfreeze.CalibrationError, match="there are none"):
        probe(Taking(), [])


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(PolicyError, match="No norm layer"):
        probe(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)), [])
    with pytest.raises(PolicyError, match="Did you mean 'bn'"):
        probe(Taking(), [torch.randn(2, 3)], select="bnn")
    assert len(probe(Taking(), [torch.randn(2, 3)], select="bn").layers) == 1
    ghost = Taking()
    ghost.bn.running_mean, ghost.bn.running_var = torch.zeros(6), torch.ones(6)
    with pytest.raises(CalibrationError, match=r"bn: its statistics have 6 .* 3 channels"):
        probe(ghost, [torch.randn(2, 3)])
    with pytest.raises(TypeError, match=r"nn\.Module"):
        probe({}, [])


class Masked(nn.BatchNorm1d):
    """Takes the statistics of what is not padding."""

    def forward(self, x, mask=None):
        kept = x.transpose(1, 2)[mask]
        if self.training:
            super().forward(kept)
        return torch.nn.functional.batch_norm(x, self.running_mean, self.running_var)


class Padded(nn.Module):
    def __init__(self, masked=Masked):
        super().__init__()
        self.plain, self.masked = nn.BatchNorm1d(4), masked(4)

    def forward(self, x):
        mask = torch.arange(x.shape[2]).expand(len(x), -1) < 3
        return self.masked(self.plain(x) * mask[:, None], mask)


@pytest.mark.parametrize("policy", ["none", "eval"])
def test_a_layer_that_may_leave_out_padding_is_not_measured(policy):
    model, data = Padded(), [torch.randn(64, 4, 9) for _ in range(4)]
    for _ in range(100):
        model(data[0])
    if policy != "none":
        bnfreeze.freeze(model, {"masked": policy})
    before = model.masked.running_var.clone()
    for report in (probe(model, data), bnfreeze.recalibrate(model, data, select="plain")):
        assert ("masked", "layer-not-reached") in [(f.name, f.code) for f in report.findings]
        assert "Masked takes 'mask'" in "".join(f.message for f in report.findings)
    assert [one.name for one in probe(model, data).layers] == ["plain"]
    assert torch.equal(model.masked.running_var, before)
    with pytest.raises(PolicyError, match="that can be measured"):
        bnfreeze.recalibrate(model, data, select="masked")
    with pytest.raises(PolicyError, match="takes a mask"):
        probe(model.masked, data)


def test_a_layer_that_takes_other_arguments_is_measured():
    class Modulated(nn.BatchNorm1d):
        def forward(self, x, style):
            return super().forward(x) * (1 + style[:, None])

    assert [one.name for one in probe(Padded(Modulated), [torch.randn(8, 4, 9)]).layers] == [
        "plain",
        "masked",
    ]


def test_statistics_that_weight_and_bias_include_are_not_compared_with_the_data():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    data = [torch.randn(2, 3, 4, 4)]
    assert [layer.name for layer in probe(model, data).layers] == ["1", "2"]
    model[1].running_var -= 1e-5  # as in detectron2
    model[1].bias.fill_(1)
    report = probe(model, data)
    assert [layer.name for layer in report.layers] == ["2"]
    assert ("1", "never-trained", "note") in {(f.name, f.code, f.level) for f in report.findings}
    with pytest.raises(PolicyError, match="Caffe2"):
        probe(model[1], data)
    model[1] = nn.BatchNorm2d(3)  # as in mmdetection, or its statistics were reset
    nn.init.ones_(model[1].bias)
    report = bnfreeze.recalibrate(model, [torch.randn(4, 3, 4, 4)]).before
    assert [layer.name for layer in report.layers] == ["1", "2"]
    model[1].reset_running_stats()
    assert ("1", "never-trained") in {(f.name, f.code) for f in probe(model, data).findings}
