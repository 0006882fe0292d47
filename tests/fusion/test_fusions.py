"""What is fused in real models: as much as is there, and it computes what `fused` does."""

import copy
from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bnfreeze import freeze
from bnfreeze.nn import functional, modules
from tests.fusion import fusions

# Large inputs or many layers, and no form of block that the others have not.
SLOW = {"inception_v3", "googlenet", "vgg11_bn", "mnasnet1_0"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in fusions.FOLLOWED
    ],
)
def test_all_that_follows_a_norm_layer_is_fused_and_nothing_else_changes(name, monkeypatch):
    model = fusions.lively(fusions.build(name))
    report = freeze(copy.deepcopy(model), "fused-act")
    acts, sums, both = fusions.FOLLOWED[name]
    found = Counter()
    for fuses, count in fusions.counts(report).items():
        words = fuses.split("+")
        found["both" if len(words) > 1 or words == ["fused"] else words[0]] += count
    nothing = found.pop("", 0)
    assert found.pop("both", 0) == both
    assert found.pop("add", 0) == sums
    assert found.total() == acts
    # The rest is followed by something else, and the report says by what.
    silent = [row for row in report.layers if not fusions.fused(report)[row.name]]
    assert len(silent) == nothing
    assert all(row.note.endswith((" follows", " is used elsewhere too")) for row in silent)
    assert fusions.same_as_fused(model, fusions.batch(name))
    freeze(model, "fused-act")
    whole = {name for name, fuses in fusions.fused(report).items() if fuses not in ("", "fused")}
    assert fusing_layers(model, fusions.batch(name), monkeypatch) == whole


def fusing_layers(model, inputs, monkeypatch):
    """The names of the layers that fuse something when the model runs in one mode or the other."""
    names = {id(m.running_mean): n for n, m in model.named_modules() if hasattr(m, "running_mean")}
    found, real = set(), functional._apply

    def spy(x, norm, residual, branch, activation):
        if residual is not None or activation is not None:
            found.add(names[id(norm[0])])
        return real(x, norm, residual, branch, activation)

    monkeypatch.setattr(functional, "_apply", spy)
    monkeypatch.setattr(modules, "_apply", spy)
    with torch.no_grad():
        for mode in (True, False):
            model.train(mode)(*inputs)
    return found


def test_a_resnet_50_fuses_everything():
    report = freeze(fusions.build("resnet50"), "fused-act")
    assert fusions.counts(report) == {
        "relu": 33,
        "add+relu": 12,
        "affine+add+relu": 4,
        "fused": 4,
    }
    assert not fusions.reasons(report)


@pytest.mark.parametrize(
    ("name", "nothing"),
    [
        ("fcn_resnet50", 0),  # returns an OrderedDict
        ("r2plus1d_18", 0),
        ("timm/resnet50", 0),
        ("timm/efficientnet_b0", 7),
        ("timm/dla34", 6),  # joins the tensors of a list
        ("timm/hrnet_w18_small", 12),  # writes to a list
    ],
)
def test_other_models_fuse_too_and_compute_the_same(name, nothing):
    model = fusions.lively(fusions.build(name))
    report = freeze(copy.deepcopy(model), "fused-act")
    assert fusions.counts(report)[""] == nothing
    assert fusions.same_as_fused(model, fusions.batch(name))


def step(model, x, monkeypatch):
    """One forward pass in train mode: the graph's operations, and what is kept for backward.

    Returns:
        How often each operation stands in the graph; the bytes that frozen layers keep, those of
        one number a channel left out; the bytes that all operations keep together.
    """
    mine, every, inside = {}, {}, []

    def watch(function):
        real = function.apply

        def apply(*args):
            inside.append(True)
            try:
                return real(*args)
            finally:
                inside.pop()

        monkeypatch.setattr(function, "apply", apply)

    def pack(tensor):
        if tensor.dim() > 1:
            storage = tensor.untyped_storage()
            every[storage.data_ptr()] = storage.nbytes()
            if inside:
                mine[storage.data_ptr()] = storage.nbytes()
        return tensor

    watch(functional._FrozenBatchNorm)
    watch(functional._FrozenBatchNormAlone)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.train()(x)
    operations, todo, seen = Counter(), [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            operations[node.name().removesuffix("0")] += 1
            todo += [following for following, _ in node.next_functions]
    return operations, sum(mine.values()), sum(every.values())


def test_a_step_of_resnet_50_takes_49_operations_where_it_took_118(monkeypatch):
    model, x = fusions.build("resnet50"), torch.randn(1, 3, 64, 64)
    freeze(model, "fused")
    operations, *_ = step(model, x, monkeypatch)
    alone, *parts = (
        *("_FrozenBatchNormAloneBackward", "_FrozenBatchNormBackward"),
        *("ReluBackward", "AddBackward"),
    )
    assert [operations[part] for part in (alone, *parts)] == [53, 0, 49, 16]
    freeze(model, "fused-act")
    operations, *_ = step(model, x, monkeypatch)
    assert [operations[part] for part in parts] == [49, 0, 0]


def test_resnet_50_keeps_the_outputs_only_for_backward(monkeypatch):
    model, x = fusions.build("resnet50"), torch.randn(1, 3, 64, 64)
    freeze(model, "fused")
    _, none, before = step(model, x, monkeypatch)
    freeze(model, "fused-act")
    _, mine, after = step(model, x, monkeypatch)
    assert none == 0  # and ReLU keeps its outputs, which the next convolution keeps as well
    assert after == before
    # At 224 × 224, in bf16, with a batch of 64: each side is 3.5 times as long.
    assert mine * 3.5**2 / 2 * 64 / 2**30 == pytest.approx(1.15, abs=0.005)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf"])
def test_no_more_is_kept_for_backward_than_without_fusing(name, monkeypatch):
    model, x = fusions.build(name), torch.randn(2, 3, 64, 64)
    freeze(model, "fused")
    torch.manual_seed(0)
    *_, before = step(model, x, monkeypatch)
    freeze(model, "fused-act")
    torch.manual_seed(0)
    *_, after = step(model, x, monkeypatch)
    assert after <= before


def test_the_comparison_would_notice_another_activation(monkeypatch):
    model = fusions.lively(fusions.build("resnet18"))
    real = fusions.freeze

    def freeze_wrongly(model, policy, **options):
        report = real(model, policy, **options)
        if policy == "fused-act":
            model.layer1[0].bn1.weight.data[0] += 1e-6
        return report

    monkeypatch.setattr(fusions, "freeze", freeze_wrongly)
    assert not fusions.same_as_fused(model, fusions.batch("resnet18"))
