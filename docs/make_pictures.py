"""Draw the README's pictures: `python docs/make_pictures.py`."""

from pathlib import Path

import torch
import torchvision

import bnfreeze

HERE = Path(__file__).parent


def report() -> bnfreeze.FreezeReport:
    """The report in the README: a ResNet-18 whose stages are frozen in different ways."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model(torch.randn(8, 3, 64, 64))  # then the statistics are not those of a new model
    return bnfreeze.freeze(
        model,
        {
            "**": "eval+affine",  # every norm layer
            "layer1": "eval+weights",  # the first stage whole, convolutions too
            "layer4": "eval",  # the last stage: statistics frozen, weight and bias train
            "layer4.1.bn2": "none",  # except its last layer
        },
    )


if __name__ == "__main__":
    report().save_svg(HERE / "report.svg", width=80)
