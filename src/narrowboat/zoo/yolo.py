"""YOLOv3 on Darknet-53.

Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018, arXiv:1804.02767.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

_RESIDUALS_PER_STAGE = (1, 2, 8, 8, 4)
_ANCHORS_PER_SCALE = 3


class ConvBlock(nn.Module):
    """Convolution, batch normalisation, leaky ReLU: Darknet's layer."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.bn(self.conv(x)), 0.1, inplace=True)


class Residual(nn.Module):
    """1x1 to half the channels, 3x3 back, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = ConvBlock(channels, channels // 2, 1)
        self.expand = ConvBlock(channels // 2, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.expand(self.reduce(x))


class Darknet53(nn.Module):
    """Images [batch, 3, height, width] to features at 1/8 (256), 1/16 (512) and 1/32 (1,024 channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBlock(3, 32, 3)
        self.stages = nn.ModuleList()
        channels = 32
        for residuals in _RESIDUALS_PER_STAGE:
            blocks = [Residual(channels * 2) for _ in range(residuals)]
            self.stages.append(nn.Sequential(ConvBlock(channels, channels * 2, 3, stride=2), *blocks))
            channels *= 2

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[2:]


class Scale(nn.Module):
    """The detection head of one scale: five convolutions, then one that widens and one that predicts."""

    def __init__(self, channels: int, width: int, outputs: int) -> None:
        super().__init__()
        self.neck = nn.Sequential(
            ConvBlock(channels, width, 1),
            ConvBlock(width, width * 2, 3),
            ConvBlock(width * 2, width, 1),
            ConvBlock(width, width * 2, 3),
            ConvBlock(width * 2, width, 1),
        )
        self.widen = ConvBlock(width, width * 2, 3)
        self.predict = nn.Conv2d(width * 2, outputs, kernel_size=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        route = self.neck(x)
        return route, self.predict(self.widen(route))


class YOLOv3(nn.Module):
    """Images [batch, 3, height, width] to raw predictions at strides 32, 16 and 8.

    Each is [batch, 3 * (5 + classes), height / stride, width / stride]: per anchor x, y, w, h, objectness and
    the class scores, before the sigmoid. At 80 classes 61,949,149 parameters; with the running statistics of
    the batch normalisation, the 62,001,757 numbers of Darknet's ``yolov3.weights``.
    """

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        outputs = _ANCHORS_PER_SCALE * (5 + classes)
        self.backbone = Darknet53()
        self.large = Scale(1024, 512, outputs)
        self.to_medium = ConvBlock(512, 256, 1)
        self.medium = Scale(256 + 512, 256, outputs)
        self.to_small = ConvBlock(256, 128, 1)
        self.small = Scale(128 + 256, 128, outputs)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images ``[batch, 3, h, w]`` to boxes at strides 32, 16, 8: ``[batch, outputs, h / stride, w / stride]``."""
        fine, middle, coarse = self.backbone(images)
        route, large = self.large(coarse)
        route = F.interpolate(self.to_medium(route), scale_factor=2.0, mode="nearest")
        route, medium = self.medium(torch.cat((route, middle), dim=1))
        route = F.interpolate(self.to_small(route), scale_factor=2.0, mode="nearest")
        _, small = self.small(torch.cat((route, fine), dim=1))
        return large, medium, small
