"""An operator as it was called, kept so that it can be called again without keeping its arguments alive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from narrowboat.errors import ReplayError
from narrowboat.train.tape.facts import OpFacts
from narrowboat.train.tape.leaves import plain, tensors_in


@dataclass(frozen=True, slots=True)
class Ref:
    """A view of a storage that the pass made.

    Attributes:
        number: the storage.
        dtype, size, stride, offset: the view; ``offset`` in elements.
    """

    number: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The view over ``storage``."""
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.size, self.stride
        )


class Outside:
    """A tensor from outside (a weight, a buffer, an input) that the operator reads, and the version that it read."""

    __slots__ = ("_owner", "_version", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        owner = tensor if tensor._base is None else tensor._base
        # Below autograd, where operators are noted, an alias does not share its original's version.
        self.tensor = tensor.detach()
        self._owner = owner if owner.is_leaf else self.tensor
        self._version = self._owner._version

    def get(self) -> torch.Tensor:
        """The tensor. Raises ReplayError if it was written to since."""
        if self._owner._version != self._version:
            raise ReplayError(
                f"a tensor of shape {list(self.tensor.shape)} from outside the pass (weight, buffer or input) was "
                "written to between the forward pass and its replay; step the optimizer after the backward pass"
            )
        return self.tensor

    def part(self) -> None:
        """Go over to a copy, as the original is about to be written to."""
        self.tensor = self._owner = self.tensor.clone()
        self._version = self._owner._version


@dataclass(frozen=True, slots=True)
class Scratch:
    """A tensor from outside that the operator writes to (running statistics): a replay gets a copy of it."""

    tensor: torch.Tensor


@dataclass(slots=True)
class EncodedOp:
    """One call.

    Attributes:
        func: the operator.
        args, kwargs: with ``Ref``, ``Outside`` and ``Scratch`` where tensors were.
        read: storages that the pass made and it reads, by number.
        outside: what it reads from outside, by the address of the storage.
        created: for each storage that it made: the place among its results, and the number.
        generator, state: the random generator that it draws from and the state before; None for none.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    read: tuple[int, ...] = ()
    outside: list[tuple[int, Outside]] = field(default_factory=list)
    created: tuple[tuple[int, int], ...] = ()
    generator: torch.Generator | None = None
    state: torch.Tensor | None = None

    def run(self, storage_of: Callable[[int], torch.UntypedStorage]) -> list[tuple[int, torch.UntypedStorage]]:
        """Call it again.

        Args:
            storage_of: the storage that has a number now.

        Returns:
            The storages that it made, with their numbers.
        """
        args = [_decode(value, storage_of) for value in self.args]
        kwargs = {name: _decode(value, storage_of) for name, value in self.kwargs.items()}
        if self.generator is None:
            out = self.func(*args, **kwargs)
        else:
            now = self.generator.get_state()
            assert self.state is not None
            self.generator.set_state(self.state)
            try:
                out = self.func(*args, **kwargs)
            finally:
                self.generator.set_state(now)
        results = list(tensors_in(out))
        return [(number, results[place].untyped_storage()) for place, number in self.created]


def _decode(value: Any, storage_of: Callable[[int], torch.UntypedStorage]) -> Any:
    if isinstance(value, Ref):
        return value.over(storage_of(value.number))
    if isinstance(value, Outside):
        return value.get()
    if isinstance(value, Scratch):
        return value.tensor.clone()
    if isinstance(value, (list, tuple)):
        return [_decode(item, storage_of) for item in value]
    return value


def ref_to(tensor: torch.Tensor, number: int) -> Ref:
    """How ``tensor`` looks at storage ``number``."""
    return Ref(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def encode(
    func: Any,
    facts: OpFacts,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    number_of: Callable[[torch.UntypedStorage], int | None],
) -> EncodedOp:
    """Note a call before it runs.

    Args:
        number_of: the number of a storage; None for one from outside.
    """
    read: dict[int, None] = {}
    outside: list[tuple[int, Outside]] = []

    def note(value: Any, written: bool) -> Any:
        if isinstance(value, torch.Tensor):
            if not plain(value):
                return value
            storage = value.untyped_storage()
            number = number_of(storage)
            if number is not None:
                read[number] = None
                return ref_to(value, number)
            if written:
                return Scratch(value.detach().clone())
            alias = Outside(value)
            outside.append((storage._cdata, alias))
            return alias
        if isinstance(value, (list, tuple)):
            return [note(item, written) for item in value]
        return value

    encoded = EncodedOp(
        func,
        tuple(note(value, place in facts.writes) for place, value in enumerate(args)),
        {name: note(value, name in facts.writes_named) for name, value in kwargs.items()},
    )
    encoded.read, encoded.outside = tuple(read), outside
    if facts.random:
        encoded.generator = _generator(args, kwargs)
        encoded.state = encoded.generator.get_state()
    return encoded


def _generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
    for given in (*args, *kwargs.values()):
        if isinstance(given, torch.Generator):
            return given
    device = kwargs.get("device")
    for tensor in tensors_in((args, kwargs)):
        device = tensor.device
        break
    device = torch.device(device) if device is not None else torch.get_default_device()
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
