"""From a skeleton to its program: one pass on fake tensors, in which modules are called and operators noted."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from narrowboat.cluster.pipeline.message import span
from narrowboat.cluster.pipeline.program import Constant, Facts, Instruction, Leaf, Program, Slot
from narrowboat.errors import ModelError
from narrowboat.profile.skeleton import tensor_names

_SHARE = 16
"""A module with more than this part of the weights is looked into for places to cut, if it has modules inside."""
# They hand the weights of the modules inside them to one operator.
_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.RNNBase)
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_RANDOM = torch.Tag.nondeterministic_seeded


def units(module: nn.Module, no_split: Collection[str] = ()) -> list[str]:
    """Paths of the modules that are called whole, in the order of the tree; none lies in another.

    Args:
        module: the model.
        no_split: class names of modules that are not to be looked into.
    """
    total = sum(t.numel() * t.element_size() for t, _, _ in tensor_names(module).values())
    found: list[str] = []

    def walk(path: str, child: nn.Module) -> None:
        inside = list(child.named_children())
        weight = sum(p.numel() * p.element_size() for p in {*child.parameters(), *child.buffers()})
        # A bare list is never called: there is nothing to be called whole.
        callable_whole = type(child).forward is not nn.Module.forward
        small = weight * _SHARE <= total or not inside
        if path and callable_whole and (small or isinstance(child, _WHOLE) or type(child).__name__ in no_split):
            found.append(path)
            return
        for name, grandchild in inside:
            walk(f"{path}.{name}" if path else name, grandchild)

    walk("", module)
    return found


@dataclass(eq=False)
class _Notes:
    """What the recorder knows while it runs."""

    program: Program
    slots: dict[int, Slot]  # by id of the fake
    leaves: dict[int, str]  # by id of the fake weight
    storages: dict[int, int]
    leaf_storages: dict[int, str]
    keep: list[Any]

    def reference(self, value: Any, what: str, verb: str = "is handed") -> Any:
        """How an instruction names an argument."""
        if isinstance(value, torch.Tensor):
            if id(value) in self.leaves:
                return Leaf(self.leaves[id(value)])
            if id(value) in self.slots:
                return self.slots[id(value)]
            if isinstance(value, FakeTensor):
                raise _UncuttableError(f"{what} takes a tensor that no operator was seen to make")
            self.keep.append(value)
            for number, constant in enumerate(self.program.constants):
                if constant is value:
                    return Constant(number)
            self.program.constants.append(value)
            return Constant(len(self.program.constants) - 1)
        if isinstance(value, _PLAIN):
            return value
        if _holds_tensors(value):
            raise _UncuttableError(
                f"{what} {verb} a {type(value).__name__}, an object with tensors inside that it may change"
                + (": call the model with use_cache=False" if "Cache" in type(value).__name__ else "")
            )
        return value

    def define(self, value: Any) -> Slot | None:
        """The slot of a tensor that was made, or handed through; None for another value."""
        if not isinstance(value, torch.Tensor) or id(value) in self.leaves:
            return None
        if id(value) not in self.slots:
            slot = Slot(len(self.program.facts))
            self.slots[id(value)] = slot
            self.keep.append(value)  # an id is only unique while its object lives
            storage = value.untyped_storage()
            self.keep.append(storage)
            number = self.storages.setdefault(storage._cdata, len(self.storages))
            self.program.facts[slot.number] = Facts(
                tuple(value.shape), value.dtype, number, *span(value), storage._cdata in self.leaf_storages
            )
        return self.slots[id(value)]


class _UncuttableError(Exception):
    """The reason why a model cannot be parted."""


class _Recorder(TorchDispatchMode):
    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes
        self.inside: list[str] = []  # of the module that is being called whole

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        where = f"module {self.inside[-1]}" if self.inside else "the code between the modules"
        if _RANDOM in func.tags and _chance(func, args, kwargs):
            raise _UncuttableError(f"{where} draws random numbers ({func}): call .eval() in the factory")
        if func._schema.is_mutable:
            self._check_writes(func, args, kwargs, where)
        if not self.inside:
            notes = self.notes
            flat, tree = tree_flatten((args, kwargs))
            arguments = tuple(notes.reference(value, f"operator {func}") for value in flat)
            results = tuple(notes.define(value) for value in tree_flatten(out)[0])
            notes.program.instructions.append(Instruction(func, arguments, tree, results))
        return out

    def _check_writes(self, func: Any, args: Any, kwargs: Any, where: str) -> None:
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(value, torch.Tensor):
                continue
            name = self.notes.leaf_storages.get(value.untyped_storage()._cdata)
            if name is not None:
                raise _UncuttableError(
                    f"{where} writes to {name}: what a pass leaves behind cannot be on several nodes"
                )


def _chance(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of an operator that may draw random numbers does: attention without dropout does not."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True


def record(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, no_split: Collection[str] = ()
) -> Program:
    """The program of one pass; the module itself is left alone.

    Args:
        module: a skeleton (its weights are not read).
        args, kwargs: inputs of one pass; of tensors, shapes alone count, other values are kept as they are.
        no_split: class names of modules that are called whole however large they are.

    Raises:
        ModelError: the model cannot be parted, and why: it decides by the values of tensors, draws random numbers,
            writes to its weights, or hands on objects (a key-value cache) that its layers change.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    program = Program()
    notes = _Notes(program, {}, {}, {}, {}, [])
    try:
        with torch.no_grad():
            double = _double(module, mode, notes)
            flat, program.input_tree = tree_flatten((args, kwargs))
            flat = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in flat]
            program.inputs = [notes.define(value) for value in flat]
            program.input_values = [None if isinstance(v, torch.Tensor) else v for v in flat]
            recorder = _Recorder(notes)
            for path in units(double, no_split):
                _whole(double.get_submodule(path), path, recorder)
            fake_args, fake_kwargs = tree_unflatten(flat, program.input_tree)
            with mode, recorder:
                out = double(*fake_args, **fake_kwargs)
        values, program.output_tree = tree_flatten(out)
        program.outputs = [notes.reference(value, "the result", "holds") for value in values]
    except _UncuttableError as why:
        raise ModelError(f"{type(module).__name__} cannot be parted into stages: {why}") from None
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if "DataDependent" in said or "data-dependent" in said:
            said = f"what it does depends on the values of tensors ({said})"
        raise ModelError(f"{type(module).__name__} cannot be parted into stages: {said}") from error
    _drop_unused(program)
    return program


def _double(module: nn.Module, mode: FakeTensorMode, notes: _Notes) -> nn.Module:
    """A copy with fake weights and buffers, known to ``notes`` by name."""
    memo: dict[int, Any] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) in memo:
            continue
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
        notes.keep.append(fake)
        notes.leaves[id(fake)] = name
        notes.leaf_storages[fake.untyped_storage()._cdata] = name
    return copy.deepcopy(module, memo)


def _whole(child: nn.Module, path: str, recorder: _Recorder) -> None:
    """Have calls of ``child`` noted as one instruction, and what happens in them not."""
    forward = child.forward
    notes = recorder.notes

    @functools.wraps(forward)
    def called(*args: Any, **kwargs: Any) -> Any:
        if recorder.inside:
            return forward(*args, **kwargs)
        flat, tree = tree_flatten((args, kwargs))
        arguments = tuple(notes.reference(value, f"module {path}") for value in flat)
        recorder.inside.append(path)
        try:
            out = forward(*args, **kwargs)
        finally:
            recorder.inside.pop()
        values = tree_flatten(out)[0]
        for value in values:
            if not isinstance(value, (torch.Tensor, *_PLAIN)) and _holds_tensors(value):
                raise _UncuttableError(
                    f"module {path} returns a {type(value).__name__}, an object with tensors inside"
                )
        results = tuple(notes.define(value) for value in values)
        notes.program.instructions.append(Instruction(path, arguments, tree, results))
        return out

    child.forward = called


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, (type, nn.Module)):
        return False
    if "Cache" in type(value).__name__:  # one that is empty now will not stay so
        return True
    inside = value if isinstance(value, (list, tuple, set)) else list(getattr(value, "__dict__", {}).values())
    return any(_holds_tensors(member, depth - 1) for member in inside)


def _drop_unused(program: Program) -> None:
    """Leave out operators whose results nothing takes, and that write nothing."""
    wanted = {value.number for value in program.outputs if isinstance(value, Slot)}
    kept: list[Instruction] = []
    for instruction in reversed(program.instructions):
        writes = instruction.is_module or instruction.target._schema.is_mutable
        if writes or instruction.made() & wanted:
            kept.append(instruction)
            wanted |= instruction.slots()
    program.instructions = kept[::-1]
