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


def small(frozen=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    if frozen:
        bnfreeze.freeze(model)
    return model


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ("frozen", r"Nothing in the model is frozen.*freeze"),
        ("1.runing_mean", r"matches no tensor.*Did you mean '1.running_mean'"),
    ],
)
def test_nothing_to_check_is_an_error(tensors, message):
    with pytest.raises(bnfreeze.PolicyError, match=message):
        bnfreeze.snapshot(small(frozen=False), tensors=tensors)


def test_a_model_without_norm_layers_or_tensors_is_an_error():
    with pytest.raises(bnfreeze.PolicyError, match="no norm layer"):
        bnfreeze.snapshot(nn.Linear(1, 1), tensors="norm")
    with pytest.raises(bnfreeze.PolicyError, match="no tensor"):
        bnfreeze.snapshot(nn.ReLU(), tensors="all")


def test_a_model_that_lost_everything_is_not_ok():
    before = bnfreeze.snapshot(small())
    report = bnfreeze.verify(nn.ReLU(), before)
    assert not report.ok
    assert report.checked == 0
    assert {drift.kind for drift in report.drifts} == {"removed"}


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"Expected an nn.Module"):
        bnfreeze.snapshot({})
    with pytest.raises(TypeError, match="Expected a Snapshot, not dict"):
        bnfreeze.verify(small(), {})
    with pytest.raises(TypeError, match="optimizer"):
        bnfreeze.snapshot(small(), optimizer=3)


def test_each_selection_is_of_its_tensors():
    model = small(frozen=False)
    bnfreeze.freeze(model, {"1": "eval", "3": "affine", "0": "weights"})
    names = {
        "frozen": [
            *("0.weight", "0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"),
            *("3.weight", "3.bias"),
        ],
        "norm": [
            f"{layer}.{key}"
            for layer in (1, 3)
            for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ],
        "3": ["3.weight", "3.bias", "3.running_mean", "3.running_var", "3.num_batches_tracked"],
        "**.running_var": ["1.running_var", "3.running_var"],
    }
    for tensors, expected in names.items():
        assert list(bnfreeze.snapshot(model, tensors=tensors).names) == expected
    everything = bnfreeze.snapshot(model, tensors="all").names
    assert set(everything) == {*names["norm"], "0.weight", "0.bias"}


def test_buffers_that_a_state_dict_lacks_are_seen():
    model = small()
    model.register_buffer("passing", torch.ones(2), persistent=False)
    model.attribute = torch.ones(2)
    before = bnfreeze.snapshot(model, tensors="all")
    model.passing[0] = 2
    model.attribute[1] = 2
    drifts = bnfreeze.verify(model, before).drifts
    assert [(drift.name, drift.first_index) for drift in drifts] == [
        ("passing", (0,)),
        ("attribute", (1,)),
    ]


def test_frozen_layers_of_other_libraries_are_frozen():
    layer = FrozenBatchNorm2d(3)
    model = nn.Sequential(layer)
    before = bnfreeze.snapshot(model)
    assert set(before.names) == {"0.weight", "0.bias", "0.running_mean", "0.running_var"}
    model.train()
    assert bnfreeze.verify(model, before).ok
    layer.bias += 1
    assert [drift.name for drift in bnfreeze.verify(model, before).drifts] == ["0.bias"]


@pytest.mark.parametrize("policy", ["stats+affine", "affine", "weights"])
def test_the_mode_may_change_where_the_policy_leaves_it_free(policy):
    model = small(frozen=False)
    bnfreeze.freeze(model, policy)
    before = bnfreeze.snapshot(model.eval())
    assert bnfreeze.verify(model.train(), before).ok


def test_a_fused_layer_given_back_is_thawed():
    model = small(frozen=False)
    bnfreeze.freeze(model, "fused")
    before = bnfreeze.snapshot(model)
    assert bnfreeze.verify(model.train(), before).ok
    bnfreeze.unfreeze(model)
    assert "thawed" in {drift.kind for drift in bnfreeze.verify(model, before).drifts}


def test_going_into_eval_thaws_nothing():
    model = small(frozen=False).train()
    before = bnfreeze.snapshot(model, tensors="norm")
    assert bnfreeze.verify(model.eval(), before).ok


def test_a_wrapper_changes_no_name():
    model = small()
    before = bnfreeze.snapshot(model)
    compiled = torch.compile(model, backend="eager")
    assert bnfreeze.verify(compiled, before).ok
    assert bnfreeze.verify(nn.DataParallel(model), before).ok
    assert bnfreeze.snapshot(compiled) == before


def test_a_wrappers_own_tensor_of_the_same_name_stays_apart():
    model = nn.Module()
    model.register_buffer("n_averaged", torch.tensor(7))
    names = bnfreeze.snapshot(AveragedModel(model), tensors="all").names
    assert sorted(names) == ["module.n_averaged", "n_averaged"]


def test_a_shared_layer_is_reported_once():
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": norm, "b": norm})
    bnfreeze.freeze(model)
    before = bnfreeze.snapshot(model)
    assert len(before) == 10
    norm.running_mean += 1
    report = bnfreeze.verify(model, before)
    assert [drift.name for drift in report.drifts] == ["a.running_mean"]
    assert report.checked == 5


def test_a_snapshot_shares_no_memory_and_keeps_no_module():
    model = small()
    before = bnfreeze.snapshot(model, tensors="all")
    pointers = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert not pointers & {value.tensor.data_ptr() for value in before.state.values.values()}
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_snapshots_are_equal_while_nothing_changes():
    model = small()
    before = bnfreeze.snapshot(model)
    assert bnfreeze.snapshot(model) == before
    assert before == before
    assert bnfreeze.snapshot(model, digest=True) == before
    model[1].running_mean[0] = 1
    assert bnfreeze.snapshot(model) != before
    assert bnfreeze.snapshot(model, digest=True) != before
    assert before != "a snapshot"


def test_which_snapshot_is_the_earlier_one_does_not_depend_on_the_side():
    model = small()
    before = bnfreeze.snapshot(model)
    model[1].running_mean[0] = 5
    after = bnfreeze.snapshot(model)
    for left, right in ((before, after), (after, before)):
        (drift,) = left.compared_to(right).drifts
        assert (drift.before, drift.after) == (0.0, 5.0)


def test_a_snapshot_is_no_key():
    with pytest.raises(TypeError, match="unhashable"):
        hash(bnfreeze.snapshot(small()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_a_snapshot_knows_the_values(copied):
    model = small()
    before = copied(bnfreeze.snapshot(model))
    report = bnfreeze.verify(copy.deepcopy(model), before)
    assert report.ok
    assert any("copy or was read from a file" in note for note in report.notes)
    model[1].running_var[2] = 9
    assert not bnfreeze.verify(model, before).ok


def test_a_copied_model_has_other_parameters():
    model = small()
    report = bnfreeze.verify(copy.deepcopy(model), bnfreeze.snapshot(model))
    assert {drift.kind for drift in report.drifts} == {"replaced"}


def test_several_optimizers_are_noted_also_from_a_generator():
    model = small()
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model[0].parameters()]
    before = bnfreeze.snapshot(model, tensors="0", optimizer=(o for o in optimizers))
    optimizers[1].param_groups.clear()
    (drift,) = bnfreeze.verify(model, before).drifts
    assert (drift.name, drift.kind) == ("0.bias", "optimizer")


def test_swapping_tensors_is_not_prevented():
    model = small(frozen=False)
    before = bnfreeze.snapshot(model, tensors="norm")
    torch.utils.swap_tensors(model[1].weight, nn.Parameter(torch.zeros(4)))
    assert [drift.name for drift in bnfreeze.verify(model, before).drifts] == ["1.weight"]


def test_a_lazy_layer_is_unverified():
    model = nn.LazyBatchNorm2d()
    report = bnfreeze.verify(model, bnfreeze.snapshot(model, tensors="norm"))
    assert not report.ok
    assert {drift.kind for drift in report.drifts} == {"unverified"}


def test_a_model_that_is_one_layer_is_verified():
    layer = nn.BatchNorm1d(3)
    bnfreeze.freeze(layer)
    before = bnfreeze.snapshot(layer)
    assert "running_mean" in before.names
    layer.__class__ = nn.BatchNorm1d
    (drift,) = bnfreeze.verify(layer, before).drifts
    assert (drift.name, drift.kind) == ("", "thawed")
    assert "The model was thawed" in bnfreeze.verify(layer, before).message


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


def test_a_mistyped_selection_names_the_word_that_was_meant():
    with pytest.raises(bnfreeze.PolicyError, match=r"Did you mean 'norm'\?"):
        bnfreeze.snapshot(nn.BatchNorm2d(4), tensors="nrm")


def test_views_of_one_buffer_side_by_side_share_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = bnfreeze.snapshot(model, tensors="all")
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    assert bnfreeze.verify(model, before).ok
    model[1].bias.data = flat[3:5]  # the last weight of the first layer, and its first bias
    drifts = bnfreeze.verify(model, before).drifts
    assert [(d.name, d.kind) for d in drifts if d.kind != "value"] == [("0.weight", "aliasing")]


def test_the_mode_of_a_layer_that_was_never_frozen_is_a_kind_of_its_own():
    model = small(frozen=False).eval()
    before = bnfreeze.snapshot(model, tensors="norm")
    kinds = {(d.name, d.kind) for d in bnfreeze.verify(model.train(), before).drifts}
    assert kinds == {("1", "mode"), ("3", "mode")}
    model[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[1].eval())
    assert ("1", "replaced") in {(d.name, d.kind) for d in bnfreeze.verify(model, before).drifts}


def test_freezing_after_the_snapshot_thaws_nothing():
    model = small(frozen=False)
    before = bnfreeze.snapshot(model, tensors="norm")
    bnfreeze.freeze(model, "eval")
    assert bnfreeze.verify(model, before).ok


def test_a_report_is_true_if_it_is_ok():
    model = small()
    before = bnfreeze.snapshot(model)
    assert bnfreeze.verify(model, before)
    model[1].running_mean += 1
    assert not bnfreeze.verify(model, before)
    assert len(repr(bnfreeze.verify(model, before))) < 240
