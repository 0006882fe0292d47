"""recalibrate: the statistics of the data, nothing else, and nothing at all after an error."""

import copy
import random
from itertools import combinations

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import update_bn

import bnfreeze
from bnfreeze import CalibrationError, PolicyError, recalibrate
from bnfreeze.calibration.gathered import Gathered

from ..helpers import bits, moved, state

UNEVEN = [5, 1, 8, 3]


def batches(*shape, sizes=UNEVEN, seed=0, dtype=torch.float32):
    """Batches of these sizes; each has its own level, so that batches differ."""
    make = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, *shape, generator=make) * (1 + k) + 3 * k - 2).to(dtype)
        for k, n in enumerate(sizes)
    ]


def pooled(data):
    values = torch.cat(data).double().movedim(1, 0).flatten(1)
    return values.mean(1), values.var(1)


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
    )
    for norm in (model[1], model[5]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model


KINDS = {
    "BatchNorm1d (N, C)": (nn.BatchNorm1d(4), (4,)),
    "BatchNorm1d (N, C, L)": (nn.BatchNorm1d(4), (4, 7)),
    "BatchNorm2d": (nn.BatchNorm2d(4), (4, 3, 5)),
    "1×1 maps": (nn.BatchNorm2d(4), (4, 1, 1)),
    "BatchNorm3d": (nn.BatchNorm3d(4), (4, 2, 3, 2)),
    "no affine, cumulative": (nn.BatchNorm2d(4, affine=False, momentum=None), (4, 3, 5)),
    "half": (nn.BatchNorm2d(4).half(), (4, 3, 5)),
    "bfloat16": (nn.BatchNorm2d(4).bfloat16(), (4, 3, 5)),
    "double": (nn.BatchNorm2d(4).double(), (4, 3, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), KINDS.values(), ids=KINDS)
def test_a_layer_gets_the_statistics_of_all_values_rounded_once(layer, shape):
    layer = copy.deepcopy(layer)
    data = batches(*shape, dtype=layer.running_mean.dtype)
    mean, var = pooled(data)
    report = recalibrate(layer, data)
    for found, expected in ((layer.running_mean, mean), (layer.running_var, var)):
        if found.dtype is torch.float64:
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
        else:
            assert torch.equal(found, expected.to(found.dtype))
    assert layer.num_batches_tracked == len(data)
    assert report.recalibrated == ("",)
    assert report.after.layers[0].mean_shift.largest < 2e-2


def test_channels_last_and_a_sharper_mean_are_exact_too():
    layer = nn.BatchNorm2d(4)
    data = [x.contiguous(memory_format=torch.channels_last) + 1e3 for x in batches(4, 3, 5)]
    recalibrate(layer, data)
    mean, var = pooled(data)
    assert torch.equal(layer.running_mean, mean.float())
    assert torch.equal(layer.running_var, var.float())


def precise_bn(data):
    """What fvcore's `update_bn_stats` says that it computes, in fp32.

    The means and the mean squares of the batches, weighed by their sizes; the variance is the mean
    square less the squared mean, divided by the number of values and not by one less.
    """
    mean, square, total = torch.zeros(4), torch.zeros(4), 0
    for x in data:
        total += len(x)
        mean += (x.mean((0, 2, 3)) - mean) * (len(x) / total)
        square += (x.square().mean((0, 2, 3)) - square) * (len(x) / total)
    return mean, square - mean.square()


def errors(found_mean, found_var, data):
    """The largest error of a mean, in standard deviations, and of a variance, as a share of it."""
    mean, var = pooled(data)
    shift = ((found_mean.double() - mean) / var.sqrt()).abs().max().item()
    return shift, (found_var.double() / var - 1).abs().max().item()


@pytest.mark.parametrize("sizes", [UNEVEN, [1] * 12], ids=["uneven", "single samples"])
def test_peers_on_the_same_data(sizes):
    """What docs/should-i-freeze.md says of them."""
    data = batches(4, 3, 5, sizes=sizes)
    ours, theirs = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    recalibrate(ours, data)
    update_bn(data, theirs)
    assert max(errors(ours.running_mean, ours.running_var, data)) < 1e-7
    # update_bn averages the variances within batches: what lies between them is lost. And each
    # batch counts alike, whatever its size.
    shift, variance = errors(theirs.running_mean, theirs.running_var, data)
    assert variance > 0.3
    assert (shift > 0.05) == (len(set(sizes)) > 1)
    # fvcore pools, and divides by n where n − 1 is what running_var holds.
    count = sum(sizes) * 15
    assert errors(*precise_bn(data), data)[1] == pytest.approx(1 / count, rel=0.01)


def test_fp32_squares_lose_the_variance_of_a_mean_far_from_zero():
    data = [x + 3e3 for x in batches(4, 3, 5)]
    ours = nn.BatchNorm2d(4)
    recalibrate(ours, data)
    assert errors(ours.running_mean, ours.running_var, data)[1] < 1e-7
    assert errors(*precise_bn(data), data)[1] > 0.01


def test_fvcore_computes_what_is_said_of_it():
    stats = pytest.importorskip("fvcore.nn.precise_bn")
    data = batches(4, 3, 5)
    layer = nn.BatchNorm2d(4).train()
    before = layer.running_mean
    stats.update_bn_stats(layer, data, num_iters=len(data), progress=None)
    mean, var = precise_bn(data)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-4, atol=1e-5)
    assert layer.running_mean is not before  # the buffers are replaced by others


def test_nothing_else_changes():
    model = network().train()
    model[1].eval()
    calls = []
    model[4].register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    calls.clear()
    before, grads = state(model), [bits(p.grad) for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    buffers = [id(b) for b in model.buffers()]
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    data = torch.utils.data.DataLoader(torch.cat(batches(3, 8, 8)), 4, shuffle=True)

    report = bnfreeze.probe(model, data)
    assert moved(before, model) == set()
    assert len(report.layers) == 2
    bnfreeze.recalibrate(model, data, score=lambda m: torch.rand(()).item())
    assert moved(before, model) == {
        f"{layer}.{name}"
        for layer in (1, 5)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [m.training for m in model.modules()] == flags
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [id(b) for b in model.buffers()] == buffers
    assert all(torch.equal(a, bits(p.grad)) for a, p in zip(grads, model.parameters(), strict=True))
    assert len(calls) == 5 * 5  # the user's hooks run in each pass, as in evaluation


class Breaking(nn.Module):
    """Raises at the given call."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, []  # a probe puts back plain attributes

    def forward(self, x):
        self.calls.append(x)
        if len(self.calls) == self.at:
            raise RuntimeError("lights out")
        return x


@pytest.mark.parametrize(
    ("at", "options"),
    [
        *((at, {}) for at in (2, 6, 9)),  # in each of the passes
        *((at, {"exact": True}) for at in (2, 6, 9, 13)),
        *((at, {"mode": "keep-function"}) for at in (2, 6)),
    ],
    ids=str,
)
def test_after_an_error_everything_is_as_it_was(at, options):
    model = nn.Sequential(network(), Breaking(at)).train()
    before, flags = state(model), [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="lights out"):
        recalibrate(model, batches(3, 8, 8), **options)
    assert moved(before, model) == set()
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_score_that_raises_afterwards_undoes_all():
    model, scores = network(), iter([0.5])
    before = state(model)
    with pytest.raises(StopIteration):
        recalibrate(model, batches(3, 8, 8), score=lambda m: next(scores))
    assert moved(before, model) == set()


def test_nan_names_the_batch_and_the_layer_and_writes_nothing():
    model = network()
    before, data = state(model), batches(3, 8, 8)
    data[2][1, 0, 3, 3] = torch.nan
    for call in (bnfreeze.probe, recalibrate):
        with pytest.raises(CalibrationError, match=r"^batch 2: the input of 1 has NaN"):
            call(model, data)
    assert moved(before, model) == set()


def test_nan_names_the_first_layer_though_others_have_inputs_of_the_same_size():
    class Hourglass(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.deep, self.up = (nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x):
            deep = self.deep(nn.functional.max_pool2d(self.down(x), 2) / 0)
            return self.up(nn.functional.interpolate(deep, scale_factor=2))

    with pytest.raises(CalibrationError, match="the input of deep has NaN or infinity"):
        recalibrate(Hourglass(), batches(3, 8, 8))


def test_frozen_layers_are_recalibrated_only_if_they_are_named():
    data = batches(3, 8, 8)
    for policy in ("stats", "eval", "fused"):
        model = network()
        bnfreeze.freeze(model, {"1": policy})
        proof, before = bnfreeze.snapshot(model), state(model)
        report = recalibrate(model, data)
        assert report.recalibrated == ("5",)
        assert all(name.startswith("5.") for name in moved(before, model))
        assert bnfreeze.verify(model, proof).ok
        recalibrate(model, data, select="1")
        mean, _ = pooled([network()[0](x) for x in data])
        torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-6, atol=1e-6)
        assert not bnfreeze.verify(model, proof).ok
        bnfreeze.freeze(model, policy)
        with pytest.raises(PolicyError, match="select="):
            recalibrate(model, data)


def test_replace_normalises_with_each_batch_while_it_measures():
    """As train mode would: the second layer sees what a batch-normalised first one gives."""
    for policy in (None, "eval", "fused"):
        model, data = network(), batches(3, 8, 8)
        twin = copy.deepcopy(model).train()
        twin[3].eval()
        seen = []
        twin[5].register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].detach()))
        for x in data:
            twin(x)
        if policy:
            bnfreeze.freeze(model, policy)
        recalibrate(model, data, select="**")
        mean, var = pooled(seen)
        torch.testing.assert_close(model[5].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model[5].running_var.double(), var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_statistics_of_a_batch_in_half_precision_are_not_rounded(dtype):
    """The variance is beyond what float16 can show."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    recalibrate(model, [(torch.randn(512, 4) * 400 + 1000).to(dtype)] * 2)
    torch.testing.assert_close(model[1].running_mean, torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(model[1].running_var, torch.ones(4), rtol=0, atol=5e-3)


def test_fused_blocks_are_measured_like_any_other():
    model = torchvision.models.resnet.BasicBlock(3, 3).eval()
    twin, data = copy.deepcopy(model), batches(3, 8, 8)
    bnfreeze.freeze(twin, "fused-act")
    one, other = bnfreeze.probe(model, data), bnfreeze.probe(twin, data)
    torch.testing.assert_close(*(torch.tensor([x.shifts for x in r.layers]) for r in (one, other)))
    before = state(twin)
    recalibrate(model, data)
    recalibrate(twin, data, select="**")
    assert len(moved(before, twin)) == 6
    torch.testing.assert_close(twin(data[0]), model(data[0]), rtol=1e-5, atol=1e-5)


def test_exact_gives_statistics_that_the_model_then_sees():
    data = batches(3, 8, 8)
    remaining = {}
    for exact in (False, True):
        model = network()
        report = recalibrate(model, data, exact=exact)
        remaining[exact] = max(layer.mean_shift.largest for layer in report.after.layers)
        assert report.passes == (2 + 2 if exact else 3)
    assert remaining[True] < 1e-5 < 1e-2 < remaining[False]


def test_keep_function_computes_what_it_did_before():
    model = network().double()
    data = batches(3, 8, 8, dtype=torch.float64)
    x = torch.cat(data)
    model.eval()
    before, report = model(x), None
    report = recalibrate(model, data, mode="keep-function")
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert max(layer.mean_shift.largest for layer in report.after.layers) < 1e-4
    assert report.passes == 2
    float32 = network().eval()
    before = float32(x.float())
    recalibrate(float32, [d.float() for d in data], mode="keep-function")
    torch.testing.assert_close(float32(x.float()), before, rtol=1e-4, atol=1e-4)


def test_keep_function_refuses_a_layer_without_weight_and_bias():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False))
    before = state(model)
    with pytest.raises(PolicyError, match="none of its own"):
        recalibrate(model, batches(3), mode="keep-function")
    tied = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    tied[1].weight = tied[0].weight
    with pytest.raises(PolicyError, match="share"):
        recalibrate(tied, batches(3), mode="keep-function")
    with pytest.raises(ValueError, match="exact"):
        recalibrate(model, batches(3), mode="keep-function", exact=True)
    with pytest.raises(ValueError, match="replace, keep-function"):
        recalibrate(model, batches(3), mode="adabn")
    assert moved(before, model) == set()


def test_undo_gives_the_old_bits_back():
    for mode in ("replace", "keep-function"):
        model = network()
        before = state(model)
        report = recalibrate(model, batches(3, 8, 8), mode=mode)
        assert moved(before, model)
        report.undo()
        assert moved(before, model) == set()


def test_instance_norm_keeps_the_means_over_instances():
    layer = nn.InstanceNorm2d(4, track_running_stats=True)
    data = batches(4, 5, 6)
    recalibrate(layer, data)
    x = torch.cat(data).double()
    torch.testing.assert_close(layer.running_mean, x.mean((2, 3)).mean(0).float())
    torch.testing.assert_close(layer.running_var, x.var((2, 3)).mean(0).float())
    alone = [x[0] for x in data]  # (C, H, W): without a batch dimension
    recalibrate(layer, alone)
    torch.testing.assert_close(layer.running_mean, torch.stack(alone).mean((0, 2, 3)))


def test_a_shared_layer_pools_all_its_calls():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.a(x) + self.b(2 * x)

    model, data = Siamese(), batches(3)
    report = recalibrate(model, data)
    mean, var = pooled([y for x in data for y in (x, 2 * x)])
    assert torch.equal(model.a.running_mean, mean.float())
    assert torch.equal(model.a.running_var, var.float())
    assert [layer.name for layer in report.before.layers] == ["a"]


def test_layers_of_one_size_are_measured_apart_whichever_are_reached_together():
    model = nn.ModuleDict({name: nn.BatchNorm1d(3) for name in "abcd"})
    model["within"] = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    data = [(x, part) for x, part in zip(batches(3, 4), ("ab", "abc", "d", "ba"), strict=True)]

    def forward(m, batch):
        x, part = batch
        for k, name in enumerate(part):
            m[name](x * (k + 1))
            m["within"](x)

    recalibrate(model, data, forward=forward)
    for name in "abcd":
        mean, var = pooled([x * (part.index(name) + 1) for x, part in data if name in part])
        torch.testing.assert_close(model[name].running_mean, mean.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model[name].running_var, var.float(), rtol=1e-6, atol=0)
    twice = torch.cat([x for x, part in data for _ in part]).double()
    assert torch.equal(model["within"].running_mean, twice.mean((0, 2)).float())


def test_what_is_kept_does_not_grow_with_the_data_where_they_choose_the_layers(monkeypatch):
    """As in a mixture of experts."""
    kept = []
    by_name = Gathered.by_name
    monkeypatch.setattr(
        Gathered, "by_name", lambda found: kept.append(len(found._merged)) or by_name(found)
    )
    model = nn.ModuleDict({name: nn.BatchNorm1d(3) for name in "abcdef"})
    data = list(zip(batches(3, sizes=[4] * 15), combinations("abcdef", 2), strict=True))
    recalibrate(model, data, forward=lambda m, batch: [m[name](batch[0]) for name in batch[1]])
    assert max(kept) <= 2 * len(model)
    for name in "abcdef":
        mean, var = pooled([x for x, part in data if name in part])
        torch.testing.assert_close(model[name].running_mean, mean.float())
        torch.testing.assert_close(model[name].running_var, var.float())


def test_a_layer_that_is_never_reached_is_left_alone():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "unused": nn.BatchNorm1d(3)})
    before = state(model)

    def forward(m, x):
        return m["used"](x)

    report = recalibrate(model, batches(3), forward=forward)
    assert report.recalibrated == ("used",)
    assert all(name.startswith("used") for name in moved(before, model))
    assert [(f.code, f.name) for f in report.findings if f.name] == [
        ("layer-not-reached", "unused")
    ]
    with pytest.raises(CalibrationError, match="None of the chosen"):
        recalibrate(model, batches(3), select="unused", forward=forward)


def test_a_single_value_per_channel_is_refused_and_normalised_with_the_stored():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(CalibrationError, match="one value has no variance"):
        recalibrate(layer, [torch.randn(1, 3)])
    assert torch.equal(layer.running_var, torch.ones(3))
    data = batches(3, sizes=[1] * 6)
    recalibrate(layer, data)
    assert torch.equal(layer.running_mean, pooled(data)[0].float())


def test_autocast_and_wrappers():
    data = batches(3, 8, 8)
    plain, cast, wrapped = network(), network(), network()
    recalibrate(plain, data)
    with torch.autocast("cpu", torch.bfloat16):
        report = recalibrate(cast, data)
    recalibrate(nn.DataParallel(wrapped), data)
    assert cast[5].running_mean.dtype is torch.float32
    torch.testing.assert_close(cast[5].running_mean, plain[5].running_mean, rtol=0.1, atol=0.1)
    assert torch.equal(wrapped[5].running_mean, plain[5].running_mean)
    assert report.before.layers[0].samples == sum(UNEVEN)


def test_the_score_decides_what_is_advised():
    for scores, word in (((0.3, 0.9), "rose"), ((0.9, 0.3), "undo"), ((0.5, 0.5), "same")):
        given = iter(scores)
        report = recalibrate(network(), batches(3, 8, 8), score=lambda m: next(given))  # noqa: B023
        assert (report.score_before, report.score_after) == scores
        assert word in report.advice


def test_the_score_sees_the_model_in_eval_mode_before_and_after():
    model, seen = network().train(), []

    def score(m):
        assert not any(module.training for module in m.modules())
        assert not torch.is_grad_enabled()
        seen.append(m[1].running_mean.clone())
        return 0.0

    old = model[1].running_mean.clone()
    recalibrate(model, batches(3, 8, 8), score=score)
    assert torch.equal(seen[0], old)
    assert torch.equal(seen[1], model[1].running_mean)


def test_the_report_as_data_and_as_a_table(tmp_path):
    report = recalibrate(network(), batches(3, 8, 8))
    assert report.to_dict()["recalibrated"] == ["1", "5"]
    assert len(str(report).splitlines()) > 5
    report.save_svg(tmp_path / "report.svg")
    assert max(map(len, str(report).splitlines())) <= 80


def test_layers_with_the_same_statistics_are_refused():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[2].running_var = model[0].running_var
    before = state(model)
    for select in (None, "0", "2"):
        with pytest.raises(PolicyError, match="0 and 2 have the same running_var"):
            recalibrate(model, batches(4, 3, 3), select=select)
    assert not moved(before, model)


def test_statistics_without_values_are_refused_and_not_left_out():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].to_empty(device="meta")
    for look in (recalibrate, bnfreeze.probe):
        with pytest.raises(PolicyError, match="1: its running statistics are on the meta device"):
            look(model, batches(4, 3, 3))
