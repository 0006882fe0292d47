import os
import tempfile

import pytest
import torch
from torch import nn

# Ultralytics reads these when it is imported. It downloads and installs nothing at run time, and
# each process that runs tests has settings of its own.
os.environ |= {
    "YOLO_OFFLINE": "True",
    "YOLO_AUTOINSTALL": "False",
    "YOLO_CONFIG_DIR": f"{tempfile.gettempdir()}/yolo-{os.environ.get('PYTEST_XDIST_WORKER', '')}",
}

# The tensors are small: several threads would be slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Small(nn.Module):
    """A small nested model: a stem, two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.backbone = nn.Sequential(block(4, 6), block(6, 6))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 8 * 8, 5), nn.BatchNorm1d(5))

    def forward(self, x):
        return self.head(self.backbone(self.stem(x)))


def block(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


@pytest.fixture
def images():
    return torch.randn(4, 3, 10, 10)


@pytest.fixture
def model(images):
    """Return a Small whose statistics, weights and biases are not those of a new layer."""
    model = Small()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
        for _ in range(3):
            model(images + torch.randn_like(images))
    return model
