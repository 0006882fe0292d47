"""Quantization-aware training (torch.ao)."""

import pytest

import bnfreeze

from .cells import cell
from .checks import assert_frozen_as, freeze_by, keeps_its_promise, train

quantization = pytest.importorskip("torch.ao.quantization")
quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")

# Its own observers warn of how they are made.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Please use quant_min and quant_max", "ignore:torch.quantize_per_tensor"
)

FUSED = [
    ["conv1", "bn1", "relu"],
    ["layer1.conv1", "layer1.bn1"],
    ["layer2.downsample.0", "layer2.downsample.1"],
]
# What the observers keep of the activations and the weights that they have seen.
OBSERVED = (
    *("min_val", "max_val", "eps", "scale", "zero_point"),
    *("fake_quant_enabled", "observer_enabled"),
)


def fused(model):
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.fuse_modules_qat(model.train(), FUSED)


@cell("fused and prepared, then frozen")
def test_layers_inside_of_fused_ones_are_frozen(model, images, policy):
    model = quantization.prepare_qat(fused(model))
    model(images)
    freeze_by(model, policy)
    with keeps_its_promise(model, policy, apart=OBSERVED):
        train(model, images)
    assert_frozen_as(model, policy)
    converted = quantization.convert(model.eval())
    assert type(converted.conv1).__module__.startswith("torch.ao.nn.intrinsic.quantized")


@cell("frozen, then prepared without fusing")
def test_frozen_layers_are_left_alone(model, images, policy):
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    freeze_by(model, policy)
    model = quantization.prepare_qat(model.train())
    with keeps_its_promise(model, policy, apart=OBSERVED):
        train(model, images)
    assert_frozen_as(model, policy)


@cell("frozen, then fused")
def test_fusing_frozen_layers_is_refused_by_torch(model, policy, refused):
    freeze_by(model, policy)
    with refused(AssertionError, "did not find fuser method for"):
        fused(model)
    assert_frozen_as(model, policy)


@cell("fused, then frozen, then prepared")
def test_preparing_fused_layers_rebuilds_them(model, images, policy, thaws):
    model = fused(model)
    freeze_by(model, policy)
    before = bnfreeze.snapshot(model)
    model = quantization.prepare_qat(model)
    told = {layer.name: layer.policy for layer in bnfreeze.inspect(model).layers}
    assert told["layer1.conv1.bn"] == "none"
    assert not bnfreeze.verify(model, before).ok
    thaws("torch builds new layers of the fused ones: fuse, prepare, then freeze.")


def prepared_by_fx(model, images):
    mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
    return quantize_fx.prepare_qat_fx(model.train(), mapping, (images,))


@cell("`prepare_qat_fx`, frozen {when}")
@pytest.mark.parametrize("when", ["before", "after"])
def test_fx_finds_what_to_prepare_by_itself(model, images, policy, when):
    if when == "before":
        freeze_by(model, policy)
    model = prepared_by_fx(model, images)
    if when == "after":
        freeze_by(model, policy)
    with keeps_its_promise(model, policy, apart=OBSERVED):
        train(model, images)
    assert_frozen_as(model, policy)
