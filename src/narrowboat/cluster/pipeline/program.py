"""A pass as a list of instructions between which it can be cut: calls of modules, and the operators between them.

The modules called are the model's own, of their own classes, with their own Python. What the code *around* them does
(residual sums, a class token, a head that is the embedding again) is a list of ATen operators, to be called again with
the same arguments: the ones PyTorch's dispatcher called, so the same kernels and the same bits. Tensors are numbered;
what crosses a cut is what is made before it and used after it, skip connections among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of the pass, by number."""

    number: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """A parameter or buffer of the model, by its full name."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that the code around the modules makes from Python numbers."""

    number: int


@dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    """One call.

    Attributes:
        target: an ATen operator, or the path of a module.
        arguments: flat, each a Slot, Leaf, Constant, or a value of Python's.
        tree: which makes ``(args, kwargs)`` of them.
        results: for each value of the flattened result, its slot; None where it is no tensor.
    """

    target: Any
    arguments: tuple[Any, ...]
    tree: TreeSpec
    results: tuple[Slot | None, ...]

    @property
    def is_module(self) -> bool:
        """Whether it calls a module."""
        return isinstance(self.target, str)

    def slots(self) -> set[int]:
        """Numbers of the tensors it takes."""
        return {value.number for value in self.arguments if isinstance(value, Slot)}

    def made(self) -> set[int]:
        """Numbers of the tensors it makes, or hands through."""
        return {slot.number for slot in self.results if slot is not None}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a slot's tensor.

    Attributes:
        shape, dtype: of it.
        storage: number of its storage; views of one share it.
        begin, end: bytes of the storage that it spans.
        of_weight: it is a view of a weight, whose place may have another tenant when its stage has ended.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    begin: int
    end: int
    of_weight: bool = False


@dataclass
class Program:
    """One pass of one model on inputs of one shape. Never changed once recorded.

    Attributes:
        instructions: in order.
        inputs: of the flattened ``(args, kwargs)``, the slot of each tensor; None for another value.
        input_values: the other values, which have to be the same in every call.
        input_tree: of ``(args, kwargs)``.
        outputs: flat, each a Slot, Leaf, Constant or value.
        output_tree: of the result.
        facts: by slot.
        constants: the tensors that ``Constant`` means.
    """

    instructions: list[Instruction] = field(default_factory=list)
    inputs: list[Slot | None] = field(default_factory=list)
    input_values: list[Any] = field(default_factory=list)
    input_tree: Any = None
    outputs: list[Any] = field(default_factory=list)
    output_tree: Any = None
    facts: dict[int, Facts] = field(default_factory=dict)
    constants: list[torch.Tensor] = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> Program:
        return self

    def wanted_after(self, at: int) -> set[int]:
        """Slots that the instructions from ``at`` on, or the result, take from before."""
        wanted = {value.number for value in self.outputs if isinstance(value, Slot)}
        for instruction in reversed(self.instructions[at:]):
            # A tensor handed through (changed in place) is both made and taken: it comes from before.
            wanted -= instruction.made() - instruction.slots()
            wanted |= instruction.slots()
        return wanted

    def crossing(self, at: int) -> tuple[int, ...]:
        """Slots that cross a cut before instruction ``at``, ascending."""
        if at >= len(self.instructions):
            return tuple(sorted({v.number for v in self.outputs if isinstance(v, Slot)}))
        if at == 0:
            return tuple(slot.number for slot in self.inputs if slot is not None)
        return tuple(sorted(self.wanted_after(at)))

    def bytes_of(self, slots: Sequence[int]) -> int:
        """Bytes that these tensors take in a message: storages that several share once."""
        spans: dict[int, tuple[int, int]] = {}
        for facts in (self.facts[slot] for slot in slots):
            begin, end = spans.get(facts.storage, (facts.begin, facts.end))
            spans[facts.storage] = min(begin, facts.begin), max(end, facts.end)
        return sum(end - begin for begin, end in spans.values())

    def leaves(self, begin: int, end: int) -> list[str]:
        """Names of the weights that operators in ``[begin, end)`` take themselves, and the result where it ends."""
        flat = [value for instruction in self.instructions[begin:end] for value in instruction.arguments]
        if end >= len(self.instructions):
            flat += self.outputs
        return list(dict.fromkeys(value.name for value in flat if isinstance(value, Leaf)))

    def modules(self, begin: int, end: int) -> list[str]:
        """Paths of the modules called in ``[begin, end)``, each once."""
        return list(dict.fromkeys(i.target for i in self.instructions[begin:end] if i.is_module))

    def digest(self) -> str:
        """What tells a program from another, the same on every machine."""
        told = hashlib.sha256()
        for i in self.instructions:
            told.update(f"{i.target}|{[_shown(a) for a in i.arguments]}|{i.results}\n".encode())
        told.update(f"{[_shown(v) for v in self.outputs]}".encode())
        for number, facts in sorted(self.facts.items()):
            told.update(f"{number} {facts.shape} {facts.dtype}\n".encode())
        for constant in self.constants:
            told.update(constant.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return told.hexdigest()

    def tensors_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call's inputs, in order."""
        return [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]

    def result(self, values: Sequence[Any]) -> Any:
        """What the model would have returned, from its flat values."""
        return tree_unflatten(list(values), self.output_tree)


def _shown(value: Any) -> str:
    """A value without what differs between two processes: addresses of objects."""
    if isinstance(value, (Slot, Leaf, Constant, int, float, str, bool, bytes, complex, type(None), torch.Size)):
        return repr(value)
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value)
    return type(value).__qualname__
