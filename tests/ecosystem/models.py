"""The model of these tests: as small as a residual network can be."""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

__all__ = ["SmallResNet", "prepared"]


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


def prepared(seed=0):
    """Return a SmallResNet whose statistics, weights and biases are not those of a new layer."""
    torch.manual_seed(seed)
    model = SmallResNet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
        for _ in range(3):
            model(torch.randn(4, 3, 16, 16))
    return model
