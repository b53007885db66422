"""What has to be the same for one measurement, and one plan, to serve two batches."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from narrowboat.train.micro_batch import batch_size, has_rows, tensors_in


def signature(model: nn.Module, inputs: Any, targets: Any = None) -> Hashable:
    """Shapes but for the number of samples, dtypes, devices, train modes, which parameters are trained, autocast."""
    samples = batch_size(inputs, targets)
    shapes = tuple(
        (tuple(tensor.shape[1:] if has_rows(tensor, samples) else tensor.shape), tensor.dtype, tensor.device)
        for tensor in tensors_in((inputs, targets))
    )
    modes = tuple(module.training for module in model.modules())
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    return shapes, hash(modes), hash(trained), autocast
