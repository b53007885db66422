"""Which of a model's tensors are on storage during training, and which in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from narrowboat.arena.slot import Weight
from narrowboat.checkpoint import TensorEntry, WeightsIndex
from narrowboat.checkpoint.source import file_source
from narrowboat.errors import ModelError, StreamedModelError, WeightsMismatchError
from narrowboat.profile.skeleton import tensor_names
from narrowboat.stream.api import session
from narrowboat.train.weights.room import page_up
from narrowboat.train.weights.standins import LazySlot


@dataclass
class Matching:
    """What becomes of each tensor of a model.

    Attributes:
        frozen: parameters that are not trained, with their bytes in the weights file; names that share bytes
            are together.
        trained: parameters without memory that are to be trained.
        buffers: buffers without memory, which are loaded.
    """

    frozen: list[tuple[str, TensorEntry, list[torch.Tensor]]] = field(default_factory=list)
    trained: list[tuple[str, TensorEntry, torch.Tensor]] = field(default_factory=list)
    buffers: list[tuple[str, TensorEntry, torch.Tensor]] = field(default_factory=list)


def take_over(model: nn.Module) -> tuple[WeightsIndex | None, Callable[[], None] | None]:
    """Make a streamed model a skeleton again; its session is closed, and ``nb.session(model)`` says so.

    Returns:
        The weights file that it was streamed from (None if it was not streamed), and what deletes that file where
        the session had made it itself.
    """
    try:
        before = session(model)
    except StreamedModelError:
        return None, None
    cleanup, before._cleanup = before._cleanup, None  # the file is still needed
    before.close()
    before._cleanup = cleanup  # should this come to nothing, the next attempt finds it
    before.dismantle()
    return before.prepared.index, cleanup


def match(model: nn.Module, index: WeightsIndex) -> Matching:
    """Sort a model's tensors by what becomes of them.

    Parameters in memory that are trained, and what the file does not have, are left alone: they are the user's.

    Raises:
        WeightsMismatchError: a tensor without memory is missing in the file, or has another shape or dtype there.
    """
    made = Matching()
    shared: dict[tuple[str, int, tuple[int, ...]], list[torch.Tensor]] = {}
    problems: list[str] = []
    for tensor, names, is_parameter in tensor_names(model).values():
        if not tensor.is_meta and (not is_parameter or tensor.requires_grad):
            continue
        stored = [name for name in names if index.resolve(name) is not None]
        entry = index.resolve(stored[-1]) if stored else None  # as load_state_dict: the last name wins
        if entry is None:
            if tensor.is_meta:
                problems.append(f"{names[0]} is missing")
        elif tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            here = f"{_short(tensor.dtype)} {list(tensor.shape)}"
            problems.append(f"{names[0]}: the model has {here}, the file {_short(entry.dtype)} {list(entry.shape)}")
        elif not is_parameter:
            made.buffers.append((names[0], entry, tensor))
        elif tensor.requires_grad:
            made.trained.append((names[0], entry, tensor))
        else:
            # Tensors without elements may share an offset with others: they are told apart by name.
            key = (str(entry.file), entry.offset, entry.shape) if entry.nbytes else (names[0], -1, entry.shape)
            if key in shared:
                shared[key].append(tensor)
            else:
                shared[key] = [tensor]
                made.frozen.append((names[0], entry, shared[key]))
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and index.resolve(name) is None]
    problems += [f"buffer {name} has no bytes, neither in memory nor in the file" for name in lost]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightsMismatchError(
            f"the weights in {index.files[0]} are not this model's: {'; '.join(problems[:10])}{more}"
        )
    return made


def put_on_storage(weight: Weight, tensor: torch.Tensor) -> None:
    """Let a stand-in be where the parameter's bytes were; the parameter object stays the same.

    Raises:
        ModelError: its memory is shared with a tensor that is not a weight.
    """
    try:
        weight.slots.append(LazySlot(weight, tensor))
    except RuntimeError as error:
        raise ModelError(
            f"weight {weight.name!r} cannot go to storage, because another tensor shares its memory (a view or a "
            f"graph made before): {str(error).splitlines()[0]}"
        ) from error


def load(index: WeightsIndex, wanted: Iterable[tuple[str, TensorEntry, torch.Tensor]]) -> int:
    """Give tensors without memory their bytes, in memory; each stays the same object. Returns how many bytes."""
    loaded = 0
    with file_source(index) as source, torch.no_grad():
        for _, entry, tensor in wanted:
            made = torch.empty(entry.shape, dtype=entry.dtype)
            flat, at = made.view(-1).view(torch.uint8).numpy() if made.numel() else None, 0
            for chunk in source.chunks(entry.name):
                assert flat is not None
                flat[at : at + len(chunk)] = chunk
                at += len(chunk)
            flag = tensor.requires_grad
            new = nn.Parameter(made, requires_grad=flag) if isinstance(tensor, nn.Parameter) else made
            torch._C._swap_tensor_impl(tensor, new)
            loaded += entry.nbytes
    return loaded


def used_together(model: nn.Module, weights: Iterable[tuple[Weight, list[torch.Tensor]]]) -> int:
    """Bytes of the largest set of weights on storage that one operator is expected to use: those of one module.

    Args:
        model: whose modules hold the weights.
        weights: what goes to storage, with the tensors of the model that show it.
    """
    weight_of = {id(tensor): weight for weight, tensors in weights for tensor in tensors}
    largest = 0
    for module in model.modules():
        own = {weight_of[id(p)] for p in module._parameters.values() if id(p) in weight_of}
        largest = max(largest, sum(page_up(weight.entry.nbytes) for weight in own))
    return largest


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
