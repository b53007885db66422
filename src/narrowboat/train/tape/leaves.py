"""Tensors among an operator's arguments and results, without the cost of a general tree walk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from narrowboat.train.tape.facts import OpFacts


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in ``value`` (nested tuples, lists and dicts), in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def written_tensors(facts: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors among the arguments that an operator writes to, by its facts."""
    for position in facts.writes:
        if position < len(args):
            yield from tensors_in(args[position])
    for name in facts.writes_named:
        if name in kwargs:
            yield from tensors_in(kwargs[name])


def plain(tensor: torch.Tensor) -> bool:
    """Whether the tape can handle it: strided, with a storage of its own, no lazy conjugation, no stand-in."""
    kind = type(tensor)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter and not is_fake(tensor):
        return False
    return tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it is one of ``FakeTensorMode``'s."""
    return type(tensor).__name__ == "FakeTensor"
