"""A subset of the sweep over torchvision; all is `python -m tests.sweeps.torchvision_models`."""

import pytest

from bnfreeze import FreezeReport, LayerRow, freeze
from tests.sweeps import torchvision_models

# The largest of the quick subset.
LARGE = {"densenet121", "fasterrcnn_mobilenet_v3_large_320_fpn", "inception_v3", "r2plus1d_18"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LARGE else ())
        for name in torchvision_models.QUICK
    ],
)
def test_a_torchvision_model_keeps_every_promise(name):
    count, _, wrong = torchvision_models.sweep(name)
    assert count > 0
    assert wrong == []


def test_the_quick_subset_compares_outputs_of_some_models():
    compared = [
        name
        for name in ("resnet18", "regnet_x_400mf", "shufflenet_v2_x0_5")
        if torchvision_models.acts_alike_in_both_modes(name, torchvision_models.build(name))
    ]
    assert compared == ["resnet18", "regnet_x_400mf", "shufflenet_v2_x0_5"]


def test_the_sweep_would_notice_layers_that_are_not_frozen(monkeypatch):
    def frozen_in_name_only(model, policy):
        return FreezeReport(
            tuple(LayerRow(name, "", policy) for name in torchvision_models.norm_layers(model))
        )

    monkeypatch.setattr(torchvision_models, "freeze", frozen_in_name_only)
    _, _, wrong = torchvision_models.sweep("shufflenet_v2_x0_5")
    for promise in (
        "stats: conv1.1.running_mean is frozen and moved",
        "eval+affine: conv1.1.weight is frozen and moved",
        "eval+affine+weights: conv1.0.weight is frozen and moved",
        "train mode is another function than eval mode",
    ):
        assert promise in wrong


def test_the_sweep_would_notice_layers_that_do_not_train(monkeypatch):
    monkeypatch.setattr(
        torchvision_models, "freeze", lambda model, policy: freeze(model, "eval+weights")
    )
    _, _, wrong = torchvision_models.sweep("shufflenet_v2_x0_5")
    assert "stats: conv1.0.weight should train and did not move" not in wrong  # no gradient either
    assert "affine: statistics should update and none did" in wrong
