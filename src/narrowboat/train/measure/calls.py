"""An operator's call without its tensors: enough to call it alone, at any number of samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from narrowboat.train.tape.facts import Kind, facts_of
from narrowboat.train.tape.leaves import tensors_in

# What may be called on zeros: kernels that trust an opaque workspace among their arguments (oneDNN's recurrent layers)
# end the process.
_TAKING = ("convolution", "mm", "addmv", "softmax", "attention", "pool", "upsample", "norm", "sum", "mean", "cumsum")


@dataclass(frozen=True, slots=True)
class Like:
    """A tensor's looks."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        """A tensor of zeros that looks so."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).zero_()


@dataclass(frozen=True, slots=True)
class Call:
    """One call.

    Attributes:
        func: the operator.
        args, kwargs: with ``Like`` where tensors were.
        made: bytes that count as its results; what it takes beyond is scratch memory.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    made: int

    @property
    def key(self) -> str:
        """Equal for calls that take the same."""
        return repr((self.func, self.args, self.kwargs))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, results included."""
        likes = [value for value in (*self.args, *(value for _, value in self.kwargs)) if isinstance(value, Like)]
        return self.made + sum(math.prod(like.shape) * like.dtype.itemsize for like in likes)

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Arguments to call it with, of zeros."""
        return [_made(value) for value in self.args], {name: _made(value) for name, value in self.kwargs}


def call_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: int) -> Call | None:
    """The call, if its kernel may take memory inside and can be called on anything; on the CPU."""
    facts = facts_of(func)
    name = facts.name.removeprefix("aten::")
    known = any(word in name for word in _TAKING) or name == "embedding_dense_backward"
    if facts.kind is Kind.MAP or name == facts.name or not known or "rnn" in name:
        return None
    tensors = list(tensors_in((args, kwargs)))
    if any(tensor.device.type != "cpu" or tensor.layout is not torch.strided for tensor in tensors):
        return None
    return Call(func, _like(args), tuple((name, _like(value)) for name, value in sorted(kwargs.items())), made)


def between(a: Call, b: Call, fitted: Callable[[int, int], int]) -> Call | None:
    """The call at a third number of samples; None where the two are not alike.

    Args:
        a, b: the same call at two numbers of samples.
        fitted: of two integers at those, the one at the third.
    """
    if a.func is not b.func:
        return None

    def joined(x: Any, y: Any) -> Any:
        if isinstance(x, Like) and isinstance(y, Like):
            return replace(x, shape=joined(x.shape, y.shape), stride=joined(x.stride, y.stride))
        if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)) and len(x) == len(y):
            return tuple(joined(*pair) for pair in zip(x, y, strict=True))
        if type(x) is int and type(y) is int:
            return fitted(x, y)
        return x

    return Call(a.func, joined(a.args, b.args), joined(a.kwargs, b.kwargs), fitted(a.made, b.made))


def _like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Like(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_like(item) for item in value)
    return value


def _made(value: Any) -> Any:
    if isinstance(value, Like):
        return value.made()
    if isinstance(value, tuple):
        return [_made(item) for item in value]
    return value
