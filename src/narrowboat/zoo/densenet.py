"""DenseNet-121: every layer reads what all layers before it in its block have made.

Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks", CVPR 2017, arXiv:1608.06993
(the variant with bottlenecks and compression, DenseNet-BC). Parameter names are torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

LAYERS_121 = (6, 12, 24, 16)
_BOTTLENECK = 4  # channels of the 1x1 convolution, in growths


class DenseLayer(nn.Module):
    """The features so far, a list of [batch, channels, height, width], to ``growth`` more channels.

    Takes the list and not its concatenation, so that the concatenation lives no longer than the layer needs it.
    """

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        width = _BOTTLENECK * growth
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth, kernel_size=3, padding=1, bias=False)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, dim=1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleDict):
    """Layers that each add ``growth`` channels: [batch, channels, ...] to [batch, channels + layers x growth, ...]."""

    def __init__(self, layers: int, channels: int, growth: int) -> None:
        super().__init__(
            {f"denselayer{i + 1}": DenseLayer(channels + i * growth, growth) for i in range(layers)},
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.values():
            features = [*features, layer(features)]  # a new list: whoever runs the layer again needs the one it had
        return torch.cat(features, dim=1)


class Transition(nn.Sequential):
    """Half the channels at half the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(channels, channels // 2, kernel_size=1, bias=False),
                pool=nn.AvgPool2d(kernel_size=2, stride=2),
            )
        )


class DenseNet(nn.Module):
    """Images [batch, 3, height, width] to logits [batch, classes]; DenseNet-121 by default, 7,978,856 parameters."""

    def __init__(self, layers: Sequence[int] = LAYERS_121, growth: int = 32, classes: int = 1000) -> None:
        super().__init__()
        channels = 2 * growth
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(channels),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        )
        for number, count in enumerate(layers, start=1):
            self.features.add_module(f"denseblock{number}", DenseBlock(count, channels, growth))
            channels += count * growth
            if number < len(layers):
                self.features.add_module(f"transition{number}", Transition(channels))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.features(images))
        return self.classifier(torch.flatten(self.avgpool(x), 1))
