"""Quantization-aware training (torch.ao)."""

import pytest

import bnfreeze

from .checks import assert_frozen_as, by_policy, freeze_by, keeps_its_promise, train

quantization = pytest.importorskip("torch.ao.quantization")
quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")

# Warnings that torch causes itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Please use quant_min and quant_max", "ignore:torch.quantize_per_tensor"
)

FUSED = [
    ["conv1", "bn1", "relu"],
    ["layer1.conv1", "layer1.bn1"],
    ["layer2.downsample.0", "layer2.downsample.1"],
]
# The buffers of the observers.
OBSERVED = (
    *("min_val", "max_val", "eps", "scale", "zero_point"),
    *("fake_quant_enabled", "observer_enabled"),
)


def fused(model):
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.fuse_modules_qat(model.train(), FUSED)


@by_policy
def test_layers_inside_fused_ones_are_frozen(model, images, policy):
    model = quantization.prepare_qat(fused(model))
    model(images)
    freeze_by(model, policy)
    with keeps_its_promise(model, policy, apart=OBSERVED):
        train(model, images)
    assert_frozen_as(model, policy)
    converted = quantization.convert(model.eval())
    assert type(converted.conv1).__module__.startswith("torch.ao.nn.intrinsic.quantized")


@by_policy
def test_frozen_layers_are_left_alone(model, images, policy):
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    freeze_by(model, policy)
    model = quantization.prepare_qat(model.train())
    with keeps_its_promise(model, policy, apart=OBSERVED):
        train(model, images)
    assert_frozen_as(model, policy)


def test_torch_refuses_to_fuse_frozen_layers(model):
    freeze_by(model, "eval")
    with pytest.raises(AssertionError, match="did not find fuser method for"):
        fused(model)
    assert_frozen_as(model, "eval")


def test_preparing_fused_layers_builds_new_ones_that_are_not_frozen(model):
    model = fused(model)
    freeze_by(model, "eval")
    before = bnfreeze.snapshot(model)
    model = quantization.prepare_qat(model)
    policies = {layer.name: layer.policy for layer in bnfreeze.inspect(model).layers}
    assert policies["layer1.conv1.bn"] == "none"
    assert not bnfreeze.verify(model, before).ok


def prepared_by_fx(model, images):
    mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
    return quantize_fx.prepare_qat_fx(model.train(), mapping, (images,))


@by_policy
@pytest.mark.parametrize("when", ["before", "after"])
def test_prepare_qat_fx(model, images, policy, when):
    if when == "before":
        freeze_by(model, policy)
    model = prepared_by_fx(model, images)
    if when == "after":
        freeze_by(model, policy)
    with keeps_its_promise(model, policy, apart=OBSERVED):
        train(model, images)
    assert_frozen_as(model, policy)
