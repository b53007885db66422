"""A stretch of a program as a module: the model's own modules under their own names, and nothing of the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from narrowboat.cluster.pipeline.program import Constant, Leaf, Program, Slot
from narrowboat.profile.skeleton import tensor_names


class Shelf(nn.Module):
    """Stands where a container stood, so that what lies in it keeps its name. Never called."""


class Part(nn.Module):
    """Runs the instructions ``[begin, end)`` of a program.

    Called with the tensors that cross into it, ascending by slot (``takes``); returns those that cross out of it
    (``gives``), or at the end of the program the flat values of its result.

    Args:
        program: the whole pass.
        model: the skeleton it was recorded from; its modules become this one's.
        begin, end: the stretch.
        identity: the program's digest, which tells a trace of this part from one of another.
    """

    def __init__(self, program: Program, model: nn.Module, begin: int, end: int, identity: str = "") -> None:
        super().__init__()
        self.begin, self.end, self.identity = begin, end, identity
        self.takes, self.gives = program.crossing(begin), program.crossing(end)
        self.__dict__["_program"] = program
        for path in program.modules(begin, end):
            _put(self, path, model.get_submodule(path))
        _register(self, model, program.leaves(begin, end))
        _register_ties(self, model)
        self.__dict__["_last"] = _last_uses(program, begin, end)
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """See the class."""
        program: Program = self.__dict__["_program"]
        there = dict(zip(self.takes, tensors, strict=True))
        del tensors
        last: list[list[int]] = self.__dict__["_last"]
        for at in range(self.begin, self.end):
            instruction = program.instructions[at]
            args, kwargs = tree_unflatten(
                [self._value(value, there) for value in instruction.arguments], instruction.tree
            )
            target = self.get_submodule(instruction.target) if instruction.is_module else instruction.target
            out = target(*args, **kwargs)
            del args, kwargs
            for slot, value in zip(instruction.results, tree_flatten(out)[0], strict=True):
                if slot is not None:
                    there[slot.number] = value
            value = out = None
            for number in last[at - self.begin]:
                there.pop(number, None)
        if self.end >= len(program.instructions):
            return tuple(self._result(value, there) for value in program.outputs)
        facts = program.facts
        return tuple(there[n].clone() if facts[n].of_weight else there[n] for n in self.gives)

    def _result(self, value: Any, there: dict[int, torch.Tensor]) -> Any:
        found = self._value(value, there)
        facts = self.__dict__["_program"].facts
        weight = isinstance(value, Leaf) or (isinstance(value, Slot) and facts[value.number].of_weight)
        return found.clone() if weight else found

    def _value(self, value: Any, there: dict[int, torch.Tensor]) -> Any:
        if isinstance(value, Slot):
            return there[value.number]
        if isinstance(value, Leaf):
            owner, _, name = value.name.rpartition(".")
            return getattr(self.get_submodule(owner), name)
        if isinstance(value, Constant):
            return self.__dict__["_program"].constants[value.number]
        return value


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    _shelf(root, owner).add_module(name, module)


def _shelf(root: nn.Module, path: str) -> nn.Module:
    at = root
    for name in filter(None, path.split(".")):
        if name not in at._modules:
            at.add_module(name, Shelf())
        child = at._modules[name]
        assert child is not None
        at = child
    return at


def _register(root: nn.Module, model: nn.Module, names: Iterable[str]) -> None:
    """Give ``root`` the named parameters and buffers of ``model``, where it does not have them already."""
    for full in names:
        owner, _, name = full.rpartition(".")
        home = model.get_submodule(owner)
        shelf = _shelf(root, owner)
        if shelf is home:
            continue
        if name in home._parameters:
            shelf.register_parameter(name, home._parameters[name])
        else:
            shelf.register_buffer(name, home._buffers[name], persistent=name not in home._non_persistent_buffers_set)


def _register_ties(root: nn.Module, model: nn.Module) -> None:
    """Give tied weights all their names: the file may know only one of them, and not the one used here."""
    here = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
    for tensor, names, is_parameter in tensor_names(model).values():
        if len(names) < 2 or id(tensor) not in here:
            continue
        for full in names:
            owner, _, name = full.rpartition(".")
            shelf = _shelf(root, owner)
            if name in shelf._parameters or name in shelf._buffers:
                continue
            if is_parameter:
                shelf.register_parameter(name, tensor)  # type: ignore[arg-type]
            else:
                shelf.register_buffer(name, tensor)


def _last_uses(program: Program, begin: int, end: int) -> list[list[int]]:
    """For each instruction, the slots that nothing takes after it."""
    wanted = set(program.crossing(end))
    last: list[list[int]] = []
    for instruction in reversed(program.instructions[begin:end]):
        mentioned = instruction.slots() | instruction.made()
        last.append(sorted(mentioned - wanted))
        wanted |= mentioned
    return last[::-1]
