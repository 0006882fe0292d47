import contextlib
import re
from dataclasses import astuple

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from .cells import cell_of, section_of


def pytest_itemcollected(item):
    """Note on the test which cell it is, for whoever writes the table."""
    # What other packages do that is deprecated is theirs to mend.
    item.add_marker(
        pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    )
    cell = cell_of(item)
    if cell is not None:
        section = section_of(item)
        item.user_properties += [
            ("cell", astuple(cell)),
            ("section", (section.title, section.versions)),
            ("gpu", item.get_closest_marker("gpu") is not None),
        ]


@pytest.fixture(autouse=True)
def device(request):
    """Skip what is marked ``gpu`` where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


class SmallResNet(nn.Module):
    """Two of torchvision's blocks, the second one with a downsample branch, and a head."""

    def __init__(self, width=8, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = BasicBlock(width, width)
        shorter = nn.Sequential(nn.Conv2d(width, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        self.layer2 = BasicBlock(width, width, stride=2, downsample=shorter)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16)


@pytest.fixture
def loader():
    """Two batches of images, each with its class."""
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)
    return torch.utils.data.DataLoader(data, 4)


@pytest.fixture
def model(images):
    """A SmallResNet with statistics, weights and biases that are not those of a new layer."""
    model = SmallResNet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
        for _ in range(3):
            model(images + torch.randn_like(images))
    return model


@pytest.fixture
def refused(record_property):
    """``with refused(error, says):`` the block must raise it; the cell is a refusal that says so.

    `says` is a part of the message, word for word.
    """

    @contextlib.contextmanager
    def refused(error, says):
        with pytest.raises(error, match=re.escape(says)):
            yield
        record_property("refused", f"{error.__name__}: “{says}”")

    return refused


@pytest.fixture
def thaws(record_property):
    """``thaws(text)``: it makes live layers of frozen ones, as `text` says; the test shows how."""
    return lambda text: record_property("thaws", text)


@pytest.fixture
def fails(request):
    """``fails(reason, error)``: a cell that is still to be mended; once it is, the test fails."""

    def fails(reason, error):
        request.applymarker(pytest.mark.xfail(reason=reason, raises=error, strict=True))

    return fails


@pytest.fixture
def remark(record_property):
    """``remark(text)``: what a person should know of a cell that works."""
    return lambda text: record_property("remark", text)
