"""Images in a folder, one subfolder per class, as normalised tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from narrowboat.errors import UsageError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_LOOKED_AT = 20_000  # files whose beginnings are read before any training; some seconds
Triple = tuple[float, float, float]


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images and their classes, which are the subfolders of ``root`` in alphabetical order.

    An image is cut to the wanted shape around its middle and resized (bicubic); images in deeper folders belong to
    the subfolder's class. Files are read when they are needed and none is held; that they begin as images do is seen
    at once.

    Args:
        root: the folder.
        shape: (channels, height, width); 3 channels, or 1 for grey.
        mean, std: per channel, of values in [0, 1].

    Attributes:
        classes: names.

    Raises:
        UsageError: no such folder, fewer than two classes, a class without images, a file that is no image, or another
            number of channels.
    """

    def __init__(self, root: Path, shape: tuple[int, int, int], mean: Triple, std: Triple) -> None:
        if not root.is_dir():
            raise UsageError(f"{root} is no folder of images")
        if shape[0] not in (1, 3):
            raise UsageError(f"the model takes images of {shape[0]} channels; the recipe makes 1 or 3")
        folders = sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
        if len(folders) < 2:
            raise UsageError(
                f"{root} has {len(folders)} subfolders with images: give a folder with one subfolder per class, two "
                "or more"
            )
        self.classes = tuple(folder.name for folder in folders)
        self._shape, self._mean, self._std = shape, mean, std
        self._images: list[tuple[Path, int]] = []
        for number, folder in enumerate(folders):
            found = sorted(each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
            if not found:
                raise UsageError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
            self._images += [(each, number) for each in found]
        for path, _ in self._images[:_LOOKED_AT]:
            _look_at(path)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image, float32 [channels, height, width], and its class.

        Raises:
            UsageError: the file is no image that can be read.
        """
        path, label = self._images[index]
        return normalised(_pixels(path, self._shape), self._mean, self._std), label


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The image, of which only the beginning is read so far."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise UsageError("reading images needs a package: pip install 'narrowboat[train]'") from error
    try:
        with Image.open(path) as file:
            yield file
    except Exception as error:  # PIL's decoders raise whatever they stumble over
        told = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} is no image that can be read: {told}") from error


def _look_at(path: Path) -> None:
    with _opened(path):
        pass


def _pixels(path: Path, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    with _opened(path) as file:
        from PIL import Image, ImageOps

        image: Any = ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(image, dtype=numpy.float32) / 255.0)
    return pixels.reshape(height, width, channels).permute(2, 0, 1)


def normalised(pixels: Tensor, mean: Triple, std: Triple) -> Tensor:
    """``pixels`` [channels, height, width] in [0, 1] less ``mean``, over ``std``; grey takes their averages."""
    of_channels = torch.tensor([mean, std])
    if pixels.shape[0] == 1:
        of_channels = of_channels.mean(1, keepdim=True)
    means, deviations = of_channels[..., None, None]
    return ((pixels - means) / deviations).contiguous()
