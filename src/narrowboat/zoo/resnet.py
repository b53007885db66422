"""ResNet-50 and ResNet-101 (the "v1.5" variant, with the stride in the 3x3 convolution, as torchvision has it).

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385.
Parameter names are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

BLOCKS_50 = (3, 4, 6, 3)
BLOCKS_101 = (3, 4, 23, 3)
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, added to the input (projected where the shape changes)."""

    def __init__(self, channels: int, width: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(
            width, width, kernel_size=3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * _EXPANSION, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * _EXPANSION)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if project:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width * _EXPANSION, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(width * _EXPANSION),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self.relu(branch + (x if self.downsample is None else self.downsample(x)))


class ResNetBackbone(nn.Module):
    """Images [batch, 3, height, width] to features [batch, 2048, height / 32, width / 32].

    Args:
        blocks: bottleneck blocks of each of the four stages.
        dilate: the last two stages dilate instead of striding, and the features are of size / 8.
    """

    def __init__(self, blocks: Sequence[int] = BLOCKS_101, dilate: bool = False) -> None:
        super().__init__()
        self.stages = len(blocks)
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = 64
        dilation = 1
        for number, count in enumerate(blocks, start=1):
            width = 32 << number
            stride = 1 if number == 1 else 2
            previous_dilation = dilation
            if dilate and number > 2:
                stride, dilation = 1, dilation * 2
            stage: list[nn.Module] = [Bottleneck(channels, width, stride, previous_dilation, project=True)]
            channels = width * _EXPANSION
            stage += [Bottleneck(channels, width, 1, dilation, project=False) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return x


class ResNet(ResNetBackbone):
    """Images [batch, 3, height, width] to logits [batch, classes]."""

    def __init__(self, blocks: Sequence[int], classes: int = 1000) -> None:
        super().__init__(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * _EXPANSION, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.avgpool(super().forward(images)), 1))


def resnet50(classes: int = 1000) -> ResNet:
    """ResNet-50; 25,557,032 parameters at 1,000 classes."""
    return ResNet(BLOCKS_50, classes)


def resnet101(classes: int = 1000) -> ResNet:
    """ResNet-101; 44,549,160 parameters at 1,000 classes."""
    return ResNet(BLOCKS_101, classes)
