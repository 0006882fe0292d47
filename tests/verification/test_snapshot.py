"""What a snapshot is of, and when two are equal."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

import bnfreeze


def small(policy="eval+affine"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    if policy:
        bnfreeze.freeze(model, policy)
    return model


def kinds(model, before):
    return {(drift.name, drift.kind) for drift in bnfreeze.verify(model, before).drifts}


@pytest.mark.parametrize(
    ("model", "tensors", "message"),
    [
        (small(None), "frozen", r"Nothing in the model is frozen.*freeze"),
        (small(None), "1.runing_mean", r"matches no tensor.*Did you mean '1.running_mean'"),
        (small(None), "nrm", r"Did you mean 'norm'\?"),
        (nn.ModuleDict({"layer1": small(None)}), "layr1", "'layer1'"),
        (nn.Linear(1, 1), "norm", "no norm layer"),
        (nn.ReLU(), "all", "no tensor"),
    ],
)
def test_nothing_to_check_is_an_error(model, tensors, message):
    with pytest.raises(bnfreeze.PolicyError, match=message):
        bnfreeze.snapshot(model, tensors=tensors)


def test_a_model_that_lost_everything_is_not_ok():
    report = bnfreeze.verify(nn.ReLU(), bnfreeze.snapshot(small()))
    assert (report.ok, report.checked) == (False, 0)
    assert {drift.kind for drift in report.drifts} == {"removed"}


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"Expected an nn.Module"):
        bnfreeze.snapshot({})
    with pytest.raises(TypeError, match="Expected a Snapshot, not dict"):
        bnfreeze.verify(small(), {})
    with pytest.raises(TypeError, match="optimizer"):
        bnfreeze.snapshot(small(), optimizer=3)


def test_each_selection_is_of_its_tensors():
    model = small({"1": "eval", "3": "affine", "0": "weights"})
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    norm = {f"{layer}.{key}" for layer in (1, 3) for key in ("weight", "bias", *statistics)}
    convolution = {"0.weight", "0.bias"}
    for tensors, expected in {
        "frozen": {*convolution, *(f"1.{key}" for key in statistics), "3.weight", "3.bias"},
        "norm": norm,
        "3": {name for name in norm if name.startswith("3")},
        "**.running_var": {"1.running_var", "3.running_var"},
        "all": norm | convolution,
    }.items():
        assert set(bnfreeze.snapshot(model, tensors=tensors).names) == expected


def test_a_foreign_norm_layer_is_watched_under_norm():
    model = small()
    model.own = nn.Module()
    model.own.register_buffer("running_var", torch.ones(2))
    before = bnfreeze.snapshot(model, tensors="norm")
    model.own.running_var += 1
    assert kinds(model, before) == {("own.running_var", "value")}


def test_buffers_that_a_state_dict_lacks_are_seen():
    model = small()
    model.register_buffer("passing", torch.ones(2), persistent=False)
    model.attribute = torch.ones(2)
    before = bnfreeze.snapshot(model, tensors="all")
    model.passing[0] = model.attribute[1] = 2
    assert kinds(model, before) == {("passing", "value"), ("attribute", "value")}


def test_frozen_layers_of_other_libraries_are_frozen():
    model = nn.Sequential(FrozenBatchNorm2d(3))
    before = bnfreeze.snapshot(model)
    assert set(before.names) == {"0.weight", "0.bias", "0.running_mean", "0.running_var"}
    assert bnfreeze.verify(model.train(), before).ok
    model[0].bias += 1
    assert kinds(model, before) == {("0.bias", "value")}


@pytest.mark.parametrize("policy", ["stats+affine", "affine", "weights"])
def test_the_mode_may_change_where_the_policy_leaves_it_free(policy):
    model = small(policy)
    before = bnfreeze.snapshot(model.eval())
    assert bnfreeze.verify(model.train(), before).ok


def test_which_changes_of_class_and_mode_are_drifts():
    model = small("fused")
    before = bnfreeze.snapshot(model)
    assert bnfreeze.verify(model.train(), before).ok
    bnfreeze.unfreeze(model)
    assert ("1", "thawed") in kinds(model, before)
    live = bnfreeze.snapshot(model, tensors="norm")
    assert bnfreeze.verify(model.eval(), live).ok  # going into eval is no drift
    bnfreeze.freeze(model, "eval")  # nor is freezing
    assert bnfreeze.verify(model, live).ok
    bnfreeze.unfreeze(model)
    live = bnfreeze.snapshot(model.eval(), tensors="norm")
    assert kinds(model.train(), live) == {("1", "mode"), ("3", "mode")}
    model[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[1].eval())
    assert ("1", "replaced") in kinds(model, live)


class GradSampleModule(nn.Module):
    """As Opacus'."""

    def __init__(self, module):
        super().__init__()
        self._module = module


def test_a_wrapper_changes_no_name():
    model = small()
    before = bnfreeze.snapshot(model)
    compiled = torch.compile(model, backend="eager")
    for wrapped in (compiled, nn.DataParallel(model), AveragedModel(model).module):
        assert bnfreeze.verify(wrapped, bnfreeze.snapshot(wrapped)).ok
    assert bnfreeze.verify(compiled, before).ok
    assert bnfreeze.verify(GradSampleModule(model), before).ok
    assert bnfreeze.snapshot(compiled) == before
    model.register_buffer("n_averaged", torch.tensor(7))  # as the wrapper's own
    names = bnfreeze.snapshot(AveragedModel(model), tensors="all").names
    assert {"module.n_averaged", "n_averaged"} < set(names)


def test_a_shared_layer_is_reported_once():
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": norm, "b": norm})
    bnfreeze.freeze(model)
    before = bnfreeze.snapshot(model)
    norm.running_mean += 1
    report = bnfreeze.verify(model, before)
    assert [drift.name for drift in report.drifts] == ["a.running_mean"]
    assert (len(before), report.checked) == (10, 5)


def test_a_snapshot_shares_no_memory_and_keeps_no_module():
    model = small()
    before = bnfreeze.snapshot(model, tensors="all")
    pointers = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert not pointers & {value.tensor.data_ptr() for value in before.state.values.values()}
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_snapshots_are_equal_while_nothing_changes_whichever_side_they_stand_on():
    model = small()
    before = bnfreeze.snapshot(model)
    for digest in (False, True):
        assert bnfreeze.snapshot(model, digest=digest) == before
    model[1].running_mean[0] = 5
    after = bnfreeze.snapshot(model)
    assert after != before
    assert bnfreeze.snapshot(model, digest=True) != before
    for left, right in ((before, after), (after, before)):
        (drift,) = left.compared_to(right).drifts
        assert (drift.before, drift.after) == (0.0, 5.0)
    assert before != "a snapshot"
    with pytest.raises(TypeError, match="unhashable"):
        hash(before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_a_snapshot_knows_the_values(copied):
    model = small()
    before = copied(bnfreeze.snapshot(model))
    report = bnfreeze.verify(copy.deepcopy(model), before)
    assert report.ok
    assert any("copy or was read from a file" in note for note in report.notes)
    model[1].running_var[2] = 9
    assert kinds(model, before) == {("1.running_var", "value")}


def test_several_optimizers_are_noted_also_from_a_generator():
    model = small()
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model[0].parameters()]
    before = bnfreeze.snapshot(model, tensors="0", optimizer=(o for o in optimizers))
    optimizers[1].param_groups.clear()
    assert kinds(model, before) == {("0.bias", "optimizer")}


def test_swapping_tensors_is_not_prevented():
    model = small(None)
    before = bnfreeze.snapshot(model, tensors="norm")
    torch.utils.swap_tensors(model[1].weight, nn.Parameter(torch.zeros(4)))
    assert kinds(model, before) == {("1.weight", "value")}


def test_a_model_that_is_one_layer_is_verified():
    layer = nn.BatchNorm1d(3)
    bnfreeze.freeze(layer)
    before = bnfreeze.snapshot(layer)
    layer.__class__ = nn.BatchNorm1d
    assert kinds(layer, before) == {("", "thawed")}
    assert "The model was thawed" in bnfreeze.verify(layer, before).message


def test_views_of_one_buffer_side_by_side_share_nothing_and_overlapping_ones_do():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = bnfreeze.snapshot(model, tensors="all")
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    assert bnfreeze.verify(model, before).ok
    model[1].bias.data = flat[3:5]  # the last weight of the first layer, and its first bias
    assert kinds(model, before) == {("0.weight", "aliasing"), ("1.bias", "value")}


@pytest.mark.parametrize(
    ("policy", "optimizer"),
    [
        ("eval+affine", lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-4)),
        pytest.param(
            "stats+affine",
            lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"": "fused", "layer1": "eval+weights"},
            lambda p: torch.optim.AdamW(p, fused=True),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["eval+affine", "stats+affine", "fused and weights"],
)
def test_fifty_real_steps_of_a_frozen_model_raise_nothing(policy, optimizer):
    torch.manual_seed(0)
    model = resnet18(num_classes=4)
    bnfreeze.freeze(model, policy)
    optimizer = optimizer(list(model.parameters()))
    before = bnfreeze.snapshot(model)
    everything = bnfreeze.snapshot(model, tensors="all", digest=True)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with bnfreeze.guard(model, optimizer=optimizer) as watch:
        for step in range(50):
            model.train(step % 10 != 9)
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert watch.step == 50
    assert watch.report.ok
    bnfreeze.assert_frozen(model, before)
    assert not bnfreeze.verify(model, everything).ok  # and it did train
