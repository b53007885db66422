"""Plain PyTorch with the same weights: what a streamed model is compared with."""

from __future__ import annotations

import torch
from torch import nn

from narrowboat.checkpoint import WeightsIndex
from narrowboat.checkpoint.source import Source, file_source
from narrowboat.profile.skeleton import match_weights, tensor_names


def load_weights(module: nn.Module, index: WeightsIndex, *, buffers_only: bool = False, strict: bool = True) -> None:
    """Read every parameter and persistent buffer of ``module`` from storage into memory of its own.

    One tensor at a time, so the most that is held is the model. A tensor that has memory is overwritten in place,
    as ``load_state_dict`` would; one on meta gets memory first. Padding entries of packed files are no weights.

    Args:
        module: materialised, or a skeleton.
        index: the weights at rest, of any format that can be streamed or packed.
        buffers_only: leave the parameters alone.
        strict: refuse tensors in the file that the model does not have.

    Raises:
        WeightsMismatchError: the file is not this model's.
        WeightsChangedError: the file was replaced after it was opened.
        StorageError: the read failed.
    """
    matched = match_weights(module, index, strict=strict)
    with file_source(index) as source, torch.no_grad():
        for tensor, names, is_parameter in list(tensor_names(module).values()):
            if buffers_only and is_parameter:
                continue
            entry = matched.weights[matched.numbers[id(tensor)]].entry
            target = tensor
            if tensor.is_meta:
                target = torch.empty(tensor.shape, dtype=tensor.dtype)
            if target.is_contiguous():
                _fill(target, source, entry.name)
            else:
                packed = torch.empty(tensor.shape, dtype=tensor.dtype)
                _fill(packed, source, entry.name)
                target.copy_(packed)
            if target is not tensor:
                _put(module, names, target, tensor, is_parameter)


def _fill(target: torch.Tensor, source: Source, name: str) -> None:
    if target.numel() == 0:
        return
    content = target.detach().reshape(-1).view(torch.uint8).numpy().data
    done = 0
    for piece in source.chunks(name):
        flat = piece.cast("B") if piece.format != "B" or piece.ndim != 1 else piece
        content[done : done + len(flat)] = flat
        done += len(flat)


def _put(module: nn.Module, names: list[str], target: torch.Tensor, before: torch.Tensor, is_parameter: bool) -> None:
    """Register ``target`` under all the names, as one object, so that tied weights stay tied."""
    made = nn.Parameter(target, requires_grad=before.requires_grad) if is_parameter else target
    for name in names:
        owner, _, attribute = name.rpartition(".")
        child = module.get_submodule(owner)
        if isinstance(made, nn.Parameter):
            child._parameters[attribute] = made
        else:
            child._buffers[attribute] = made
