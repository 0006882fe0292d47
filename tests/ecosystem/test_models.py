"""Detection and segmentation models."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("timm")
import torch
import transformers
from torch import nn

import bnfreeze
from tests.sweeps import torchvision_models

from .checks import by_policy

pytestmark = pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")

# Transformers' detection models: the smallest configurations that work, with random weights.
BACKBONE = {
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "num_labels": 3,
}
RT_DETR = {
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [16, 32, 32],
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "num_queries": 5,
    "decoder_in_channels": [16] * 3,
    "decoder_ffn_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_labels": 3,
    "num_denoising": 2,
}


def detr(name, timm):
    """A model of the DETR family, with a frozen backbone of Transformers or of timm."""
    config = getattr(transformers, f"{name}Config")
    if timm:
        backbone = {"backbone": "resnet18", "use_timm_backbone": True}
    else:
        inner = transformers.ResNetConfig(**BACKBONE)
        backbone = {"backbone": None, "backbone_config": inner, "use_timm_backbone": False}
    kind = getattr(transformers, f"{name}ForObjectDetection")
    return kind(config(use_pretrained_backbone=False, **backbone, **DETR))


def rt_detr(name, frozen):
    """A model of the RT-DETR family. Its neck and decoder have plain batch norm layers."""
    config = getattr(transformers, f"{name}Config")(
        backbone_config=transformers.RTDetrResNetConfig(**BACKBONE),
        freeze_backbone_batch_norms=frozen,
        **RT_DETR,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config)


class WithLoss(nn.Module):
    """The model with the labels of two images: its output is the loss."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        one = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]])}
        return self.net(pixel_values=images, labels=[one, one]).loss


DETECTORS = {
    "DETR": lambda: detr("Detr", timm=False),
    "DETR, timm's ResNet-18": lambda: detr("Detr", timm=True),
    "Conditional DETR": lambda: detr("ConditionalDetr", timm=False),
    "Deformable DETR": lambda: detr("DeformableDetr", timm=False),
    "Deformable DETR, timm's ResNet-18": lambda: detr("DeformableDetr", timm=True),
    "RT-DETR": lambda: rt_detr("RTDetr", frozen=False),
    "RT-DETR, `freeze_backbone_batch_norms=True`": lambda: rt_detr("RTDetr", frozen=True),
    "RT-DETRv2": lambda: rt_detr("RTDetrV2", frozen=False),
}


def broken_promises(model, images, policy, head):
    """Return the promises that two steps, or unfreezing, broke."""
    with torch.no_grad():
        model.train()(images)
    return torchvision_models.check(model, (images,), policy, head if "weights" in policy else None)


@by_policy
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_keeps_every_promise(name, policy):
    torch.manual_seed(0)
    model = WithLoss(DETECTORS[name]())
    kinds = {layer.policy for layer in bnfreeze.inspect(model).layers}
    assert kinds >= ({"none"} if name.startswith("RT-DETR") else {"frozen"})
    head = "net.model.decoder.class_embed" if "RT-" in name else "net.class_labels_classifier"
    if "Deformable" in name:
        head = "net.class_embed"
    assert broken_promises(model, torch.randn(2, 3, 64, 64), policy, head) == []


# segmentation_models_pytorch.

DECODERS = ["Unet", "FPN", "PSPNet", "DeepLabV3Plus", "PAN"]
ENCODERS = ["mobilenet_v2", "efficientnet-b0", "tu-mobilenetv3_small_050"]


def segmenter(decoder, encoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    return getattr(smp, decoder)(encoder, encoder_weights=None)


@by_policy
@pytest.mark.parametrize(
    ("decoder", "encoder"),
    [(one, "resnet18") for one in DECODERS] + [("Unet", one) for one in ENCODERS],
)
def test_a_segmenter_keeps_every_promise(decoder, encoder, policy):
    model, side = segmenter(decoder, encoder), 128 if decoder == "PAN" else 64
    assert broken_promises(model, torch.randn(2, 3, side, side), policy, "segmentation_head") == []


def test_inspect_understands_freeze_encoder():
    model = segmenter("Unet", "resnet18").train()
    model.freeze_encoder()
    layers = {layer.name: layer for layer in bnfreeze.inspect(model).layers}
    encoder, decoder = layers["encoder.bn1"], layers["decoder.blocks.0.conv1.1"]
    assert not encoder.updates_statistics
    assert decoder.updates_statistics
    model.unfreeze_encoder()
    bnfreeze.freeze(model, {"encoder": "eval+affine"})
    model.unfreeze_encoder()
    (first, *_) = [f for f in bnfreeze.inspect(model).findings if f.name == "encoder.bn1"]
    assert first.code == "affine-thawed"
