"""scikit-learn's handwritten digits: 1,797 grey images of 8 by 8 that come with the package.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998 (the part
that it keeps for tests).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from narrowboat.errors import UsageError
from narrowboat.train.recipes.images import Triple, normalised

NATIVE = (1, 8, 8)


class Digits(Dataset[tuple[Tensor, int]]):
    """The images and which digit each shows.

    Args:
        shape: (channels, height, width); other heights and widths than 8 are interpolated (bilinear), channels are
            copies of the one there is.
        mean, std: per channel, of values in [0, 1].

    Raises:
        UsageError: scikit-learn is not installed.
    """

    classes = tuple("0123456789")

    def __init__(self, shape: tuple[int, int, int], mean: Triple, std: Triple) -> None:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise UsageError("the digits come with a package: pip install 'narrowboat[train]'") from error
        told = load_digits()
        self._images = torch.tensor(told.images, dtype=torch.float32).unsqueeze(1) / 16
        self._labels = [int(label) for label in told.target]
        self._shape, self._mean, self._std = shape, mean, std

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image, float32 of the wanted shape, and its digit."""
        image = self._images[index]
        channels, *size = self._shape
        if tuple(size) != NATIVE[1:]:
            image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        return normalised(image.expand(channels, -1, -1), self._mean, self._std), self._labels[index]
