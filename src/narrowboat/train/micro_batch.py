"""A batch as nested tuples, lists and dicts of tensors: how many samples it has, and cutting it along them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from narrowboat.errors import TrainingError


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a nest of tuples, lists and mappings, in order."""
    found: list[Tensor] = []
    mapped(lambda tensor: found.append(tensor) or tensor, tree)  # type: ignore[func-returns-value]
    return found


def mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same nest with each tensor changed. What is no tensor, tuple, list or mapping is passed on as it is.

    A mapping that is no dict (a tokenizer's output, say) becomes one.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple) and _is_named(tree):
        return type(tree)(*(mapped(change, item) for item in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(change, item) for item in tree)
    if isinstance(tree, Mapping):
        items = {key: mapped(change, item) for key, item in tree.items()}
        return type(tree)(items) if isinstance(tree, dict) and type(tree) is not dict else items
    return tree


class WholeArgs(tuple[Any, ...]):
    """Positional arguments of a batch that counts as one sample, as it cannot be cut."""


class WholeKwargs(dict[str, Any]):
    """Keyword arguments of such a batch."""


def whole(inputs: Any) -> WholeArgs | WholeKwargs:
    """The inputs, marked as a batch that is not cut."""
    if isinstance(inputs, Mapping):
        return WholeKwargs(inputs)
    return WholeArgs(inputs if isinstance(inputs, tuple) and not _is_named(inputs) else (inputs,))


def is_whole(inputs: Any) -> bool:
    """Whether such a batch is not cut."""
    return isinstance(inputs, (WholeArgs, WholeKwargs))


def _is_named(tree: Any) -> bool:
    return hasattr(tree, "_fields")


def batch_size(inputs: Any, targets: Any = None) -> int:
    """Samples in a batch: size of dimension 0 of the first target that has one, else of the first input.

    Raises:
        TrainingError: there is no tensor to tell it, or no input has as many rows as the targets.
    """
    if is_whole(inputs):
        return 1
    if isinstance(inputs, torch.nn.utils.rnn.PackedSequence):
        raise TrainingError("a PackedSequence interleaves its samples and cannot be cut")
    given, wanted = ([t.shape[0] for t in tensors_in(tree) if t.dim()] for tree in (inputs, targets))
    if not given and not wanted:
        raise TrainingError("the batch holds no tensor with a dimension of samples")
    if given and wanted and wanted[0] not in given:
        raise TrainingError(
            f"inputs have {given[0]} samples in dimension 0 and targets {wanted[0]}; "
            "one of them has its samples elsewhere"
        )
    return (wanted or given)[0]


def samples_in(inputs: Any, targets: Any = None) -> int:
    """Samples in a batch that is to be trained on: at least one.

    Raises:
        TrainingError: it is empty, or as :func:`batch_size`.
    """
    samples = batch_size(inputs, targets)
    if samples == 0:
        raise TrainingError("the batch is empty (dimension 0 has size 0): leave such batches out")
    return samples


def part_sizes(samples: int, parts: int) -> list[int]:
    """``samples`` in at most ``parts`` pieces that differ by one at most, larger ones first; none is empty."""
    parts = max(1, min(parts, samples))
    each, more = divmod(samples, parts)
    return [each + (index < more) for index in range(parts)]


def cut(inputs: Any, targets: Any, sizes: list[int]) -> list[tuple[Any, Any]]:
    """The batch in pieces of ``sizes`` samples, as views. Tensors without a row per sample go whole into each."""
    samples = batch_size(inputs, targets)
    if sum(sizes) != samples:
        raise ValueError(f"pieces of {sizes} do not make {samples} samples")
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        (rows(inputs, samples, start, size), rows(targets, samples, start, size))
        for start, size in zip(starts, sizes, strict=True)
    ]


def rows(tree: Any, samples: int, start: int, size: int) -> Any:
    """``size`` samples from ``start`` of each tensor that has ``samples`` of them in dimension 0."""
    return mapped(lambda t: t.narrow(0, start, size) if has_rows(t, samples) else t, tree)


def copied(tree: Any) -> Any:
    """The same nest with tensors of its own: for trial passes of models that write to their inputs."""
    return mapped(lambda tensor: tensor.clone(), tree)


def has_rows(tensor: Tensor, samples: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == samples
