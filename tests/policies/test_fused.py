"""The policy `fused`: what becomes a FrozenBatchNorm, what it computes, and the way back."""

import copy
import pickle
import types

import pytest
import timm
import torch
import torchvision
from timm.layers import freeze_batch_norm_2d as timm_freeze
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its customary name
from torch.optim.swa_utils import update_bn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozen
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

from bnfreeze import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    freeze,
    inspect,
    unfreeze,
)
from tests.helpers import copied, moved, state, step


def made(layer):
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    return layer


EXACT = {
    "1d": (nn.BatchNorm1d, (5, 6), FrozenBatchNorm1d),
    "1d over a sequence": (nn.BatchNorm1d, (5, 6, 7), FrozenBatchNorm1d),
    "2d": (nn.BatchNorm2d, (5, 6, 3, 3), FrozenBatchNorm2d),
    "3d": (nn.BatchNorm3d, (5, 6, 2, 2, 2), FrozenBatchNorm3d),
    "sync": (nn.SyncBatchNorm, (5, 6, 3, 3), FrozenBatchNorm2d),
    "sync on rows": (nn.SyncBatchNorm, (5, 6), FrozenBatchNorm2d),
    "without affine": (lambda c: nn.BatchNorm2d(c, affine=False), (5, 6, 3, 3), FrozenBatchNorm2d),
    "another eps": (lambda c: nn.BatchNorm2d(c, eps=1e-3), (5, 6, 3, 3), FrozenBatchNorm2d),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_norm_layer_becomes_a_frozen_one_and_computes_the_same_bit_for_bit(name):
    make, shape, kind = EXACT[name]
    layer = made(make(6))
    x = torch.randn(shape)
    expected, original = copy.deepcopy(layer).eval()(x), type(layer)
    (row,) = freeze(layer, "fused").layers
    assert isinstance(layer, kind)
    assert not isinstance(layer, nn.modules.batchnorm._NormBase)
    assert row.policy == "fused"
    assert row.kind == original.__name__
    assert row.actions[0] == "fuse"
    assert torch.equal(layer.train()(x), expected)
    unfreeze(layer)
    assert type(layer) is original
    assert layer.training
    assert torch.equal(layer.eval()(x), expected)


LOOKALIKES = {
    "torchvision": lambda: TorchvisionFrozen(4, eps=1e-3),
    "transformers": lambda: DetrFrozenBatchNorm2d(4),
    "timm": lambda: timm_freeze(nn.Sequential(nn.BatchNorm2d(4)))[0],
}


@pytest.mark.parametrize("library", LOOKALIKES)
def test_a_look_alike_is_adopted_and_given_back(library):
    layer = made(LOOKALIKES[library]())
    model, x, original = nn.Sequential(layer), torch.randn(2, 4, 5, 5), type(layer)
    expected, keys = layer(x), list(layer.state_dict())
    freeze(model, "fused")
    assert isinstance(layer, FrozenBatchNorm2d)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert list(layer.state_dict()) == keys
    assert "FrozenBatchNorm2d(4, eps=" in repr(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    with_count = {**layer.state_dict(), "num_batches_tracked": torch.tensor(3)}
    layer.load_state_dict(with_count, strict=True)
    (facts,) = inspect(model).layers
    assert (facts.policy, facts.num_features, facts.trains_affine) == ("fused", 4, False)
    unfreeze(model)
    assert type(layer) is original
    assert torch.equal(layer(x), expected)


def test_detectron2s_layer_is_recognised_by_name():
    # Its package need not be there: a class of that name, from a module of that name.
    forward = eval(
        "lambda self, x: F.batch_norm(x, self.running_mean, self.running_var, self.weight,"
        " self.bias, training=False, eps=self.eps)",
        {"F": F},
    )
    body = {"forward": forward, "__module__": "detectron2.layers.batch_norm"}
    layer = made(TorchvisionFrozen(4))
    layer.__class__ = type("FrozenBatchNorm2d", (nn.Module,), body)
    x = torch.randn(2, 4, 5, 5)
    expected = layer(x)
    freeze(layer, "fused")
    assert isinstance(layer, FrozenBatchNorm2d)
    assert torch.equal(layer(x), expected)


class WithGelu(nn.BatchNorm2d):
    def forward(self, x):
        return F.gelu(super().forward(x))


def patched():
    layer = nn.BatchNorm2d(4)
    layer.forward = types.MethodType(nn.BatchNorm2d.forward, layer)
    return layer


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: WithGelu(4), "WithGelu has a forward of its own"),
        (lambda: timm.layers.BatchNormAct2d(4), "BatchNormAct2d has a forward of its own"),
        (lambda: nn.InstanceNorm2d(4, track_running_stats=True), "no fused layer for Instance"),
        (patched, "overridden on the instance"),
    ],
)
def test_a_layer_that_computes_more_is_frozen_otherwise_and_the_report_says_so(make, says):
    layer = made(make())
    x = torch.randn(2, 4, 5, 5)
    expected = layer.eval()(x)
    (row,) = freeze(layer, "fused").layers
    assert row.policy == "eval+affine"
    assert row.note.startswith("not fused: ")
    assert says in row.note
    before = state(layer)
    assert torch.equal(layer.train()(x), expected)
    assert moved(before, layer) == set()
    assert freeze(layer, "fused").layers[0].actions == ()


def test_a_look_alike_with_an_activation_is_left_as_it_is():
    model = timm_freeze(nn.Sequential(timm.layers.BatchNormAct2d(4)))
    (row,) = freeze(model, "fused").layers
    assert row.policy == "frozen"
    assert type(model[0]).__name__ == "FrozenBatchNormAct2d"


def test_layers_that_were_built_frozen_are_adopted_fuse_more_and_are_given_back():
    model = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    for layer in model.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            made(layer)
    before, x = state(model), torch.randn(2, 3, 32, 32)
    expected, original = model(x), copy.deepcopy(model.state_dict())
    attributes = [set(vars(m)) for m in model.modules()]
    kinds, fuses = [type(m) for m in model.modules()], {}
    for policy in ("fused", "fused-act"):
        rows = freeze(model, policy).layers
        assert {(row.kind, row.policy) for row in rows} == {("FrozenBatchNorm2d", policy)}
        fuses[policy] = {row.name: row.fuses for row in rows}
        assert torch.equal(model(x), expected)
        assert torch.equal(copied(model, "pickle")(x), expected)
        step(model, x)
        assert {name for name in moved(before, model) if "bn" in name} == set()
        model.load_state_dict(original)  # the step trained the convolutions
    assert fuses["fused-act"]["bn1"] == "relu"
    assert fuses["fused-act"]["layer1.0.bn2"] == "add+relu"
    unfreeze(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_statistics_stay_in_fp32_when_the_model_goes_to_half_precision(model, images):
    expected = copy.deepcopy(model).eval()(images)
    freeze(model, "fused")
    for cast in (model.half, model.bfloat16):
        cast()
        for layer in (model.stem[1], model.head[2]):
            assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    out = model.train()(images.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.3
    model.double()
    assert model.stem[1].running_var.dtype == torch.float64


@pytest.mark.parametrize("again", ["fused", "fused-act"])
def test_freezing_once_more_leaves_the_statistics_in_fp32(model, again):
    freeze(model, "fused")
    model.bfloat16()
    before = state(model)
    freeze(model, again)
    assert model.stem[1].running_mean.dtype == torch.float32
    assert moved(before, model) == set()
    freeze(model, "eval")
    assert model.stem[1].running_mean.dtype == torch.bfloat16


def test_under_autocast_the_output_has_the_inputs_dtype():
    layer = made(nn.BatchNorm2d(4))
    freeze(layer, "fused")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4, 5, 5).bfloat16()).dtype == torch.bfloat16


def test_tools_that_look_for_batch_norm_leave_it_alone(model, images):
    freeze(model, "fused")
    before = state(model)
    update_bn([images], model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.func.replace_all_batch_norm_modules_(converted)
    assert converted.stem[1] is model.stem[1]
    assert moved(before, model) == set()
    assert isinstance(model.stem[1], FrozenBatchNorm2d)


def test_weight_and_bias_train_when_told_to(model, images):
    freeze(model, "fused")
    model.stem[1].requires_grad_(True)
    before = state(model)
    step(model, images)
    assert {n for n in moved(before, model) if n.startswith("stem.1")} == {
        "stem.1.weight",
        "stem.1.bias",
    }


def test_a_model_saved_whole_comes_back_fused(model, images):
    freeze(model, "fused")
    twin = copied(model, "save")
    assert torch.equal(twin.train()(images), model(images))
    unfreeze(twin)
    assert type(twin.stem[1]) is nn.BatchNorm2d
    assert type(model.stem[1]) is not nn.BatchNorm2d


def test_torchvisions_feature_extractor_takes_a_fused_model():
    model = torchvision.models.resnet18()
    freeze(model, "fused")
    features = create_feature_extractor(model, {"layer4": "out"})
    assert features(torch.randn(2, 3, 32, 32))["out"].shape == (2, 512, 1, 1)


def detection():
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64
    )
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    return model, lambda: sum(model([torch.rand(3, 64, 64)], [target]).values())


def classification(model):
    return model, lambda: model(torch.randn(2, 3, 64, 64)).square().mean()


@pytest.mark.parametrize(
    ("build", "policies", "steps"),
    [
        (lambda: classification(torchvision.models.resnet18()), {"fused"}, 3),
        (lambda: classification(timm.create_model("mobilenetv3_small_050")), {"eval+affine"}, 3),
        pytest.param(
            lambda: classification(torchvision.models.resnet50()),
            {"fused"},
            10,
            marks=pytest.mark.slow,
        ),
        # Its own FrozenBatchNorm2d becomes ours.
        pytest.param(detection, {"fused"}, 10, marks=pytest.mark.slow),
    ],
)
def test_real_models_are_frozen_trained_compared_and_undone(build, policies, steps):
    model, loss = build()
    kinds = [type(module) for module in model.modules()]
    requires = [parameter.requires_grad for parameter in model.parameters()]
    report = freeze(model, "fused")
    assert {row.policy for row in report.layers} == policies
    frozen = {row.name for row in report.layers}
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    changed = moved(before, model)
    assert changed
    assert not {name for name in changed if name.rpartition(".")[0] in frozen}
    unfreeze(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [parameter.requires_grad for parameter in model.parameters()] == requires
