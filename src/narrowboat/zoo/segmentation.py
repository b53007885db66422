"""FCN: a fully convolutional head on a dilated ResNet-101.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
arXiv:1411.4038. The shape and the parameter names are those of torchvision's ``fcn_resnet101``, without the
auxiliary head, which serves training only.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from narrowboat.zoo.resnet import ResNetBackbone


class FCN(nn.Module):
    """Images [batch, 3, height, width] to scores [batch, classes, height, width]; 51,949,141 parameters."""

    def __init__(self, classes: int = 21) -> None:
        super().__init__()
        self.backbone = ResNetBackbone(dilate=True)
        self.classifier = nn.Sequential(
            nn.Conv2d(2048, 512, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(512),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(512, classes, kernel_size=1),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = self.classifier(self.backbone(images))
        return F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)
