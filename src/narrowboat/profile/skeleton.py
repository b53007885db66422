"""The skeleton: a module with its structure and no parameter storage.

``no_storage()`` moves each parameter to meta the moment it is registered, so that at most one parameter's memory
exists at a time and ``torch.empty`` pages are never touched. Buffers stay real: the non-persistent ones (masks,
rotary frequencies) exist nowhere else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from narrowboat.arena.slot import Slot, Weight
from narrowboat.checkpoint import WeightsIndex
from narrowboat.errors import ForeignHooksError, ModelError, NarrowboatError, StreamedModelError, WeightsMismatchError

log = logging.getLogger("narrowboat")
_patch_lock = threading.RLock()
TILES = "_narrowboat_tiles"  # where a layer keeps its tiles: modules beside the tree, not in it


@contextmanager
def no_storage() -> Iterator[None]:
    """Within the context, parameters registered on any module keep shape and dtype but no bytes."""
    with _patch_lock:
        register = nn.Module.register_parameter

        def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register(self, name, param)
            if isinstance(param, nn.Parameter) and param.device.type == "cpu":
                _empty_in_place(param)

        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _empty_in_place(param: nn.Parameter) -> None:
    # In place, so that a parameter registered twice (tied) stays one object.
    if isinstance(param, nn.parameter.UninitializedParameter):
        return
    meta = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device="meta")
    try:
        torch._C._swap_tensor_impl(param, nn.Parameter(meta, requires_grad=param.requires_grad))
    except RuntimeError:
        return  # something else refers to it (a view made in __init__): it keeps its bytes, and its meaning


def build_skeleton(source: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    """A module from a factory taking no arguments, or the module given.

    Raises:
        ModelError: the factory fails or does not return a module.
        ForeignHooksError: another offloader's hooks are on it.
        StreamedModelError: it is streamed already.
    """
    if isinstance(source, nn.Module):
        module = source
    else:
        if not callable(source):
            raise ModelError(f"expected a module or a factory that makes one, got {type(source).__name__}")
        try:
            module = _call(source)
        except NarrowboatError:
            raise
        except Exception as error:
            name = getattr(source, "__qualname__", None) or getattr(source, "name", repr(source))
            raise ModelError(f"the model factory {name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(module, nn.Module):
            raise ModelError(f"the model factory returned {type(module).__name__}, not a torch.nn.Module")
    _refuse_foreign(module)
    return module


def _call(source: Callable[[], nn.Module]) -> nn.Module:
    try:
        with no_storage():
            return source()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        log.warning(
            "the model factory reads its weights while it builds (%s), so they exist in full once; "
            "for a large model, leave that out of the factory",
            str(error).splitlines()[0],
        )
    module = source()
    if isinstance(module, nn.Module):
        for parameter in module.parameters():
            if parameter.device.type == "cpu":
                _empty_in_place(parameter)
    return module


def _refuse_foreign(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            "a TorchScript module has its weights inside the script; give the eager module it was made from"
        )
    for name, child in module.named_modules():
        where = name or "the model itself"
        if "_narrowboat_engine" in child.__dict__:
            raise StreamedModelError(
                f"{where} is streamed already; close its session first: nb.session(model).close()"
            )
        if hasattr(child, "_hf_hook"):
            raise ForeignHooksError(
                f"{where} carries accelerate's hooks; remove them first: "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        if hasattr(child, "_diffusers_hook"):
            raise ForeignHooksError(
                f"{where} carries diffusers' hooks; remove them first: "
                "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(); "
                "or build the model anew without enable_group_offload()"
            )
        for parameter in child._parameters.values():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ModelError(
                    f"{where} is a lazy module; run it once so that its shapes are known, then save its weights"
                )


def streamed_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the tree with its name, in the order that numbers them; then the tiles of tiled layers."""
    yield from root.named_modules()
    for prefix, child in root.named_modules():
        for i, tile in enumerate(child.__dict__.get(TILES, ())):
            yield f"{prefix}#{i}", tile


def tensor_names(module: nn.Module) -> dict[int, tuple[torch.Tensor, list[str], bool]]:
    """The weights of a module by identity: ``id -> (tensor, names, is_parameter)``, without the
    non-persistent buffers."""
    found: dict[int, tuple[torch.Tensor, list[str], bool]] = {}
    named = list(module.named_modules(remove_duplicate=False))
    tiles = [(f"{prefix}#{i}", t) for prefix, child in named for i, t in enumerate(child.__dict__.get(TILES, ()))]
    for prefix, child in named + tiles:
        dot = prefix + "." if prefix else ""
        for name, parameter in child._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (parameter, [], True))[1].append(dot + name)
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                found.setdefault(id(buffer), (buffer, [], False))[1].append(dot + name)
    return found


@dataclass(frozen=True)
class Matched:
    """A module's weights paired with their bytes at rest.

    Attributes:
        weights: each piece of bytes once, in the order of the module's names; without slots yet.
        numbers: ``id(tensor) -> index into weights`` for every parameter and persistent buffer; several may
            share one.
    """

    weights: list[Weight]
    numbers: dict[int, int]


def match_weights(module: nn.Module, index: WeightsIndex, *, strict: bool = True) -> Matched:
    """Pair every parameter and persistent buffer with its entry in the weights file.

    Args:
        module: the skeleton.
        index: the weights at rest.
        strict: refuse tensors in the file that the model does not have.

    Raises:
        WeightsMismatchError: one error that lists what is missing, unexpected, wrongly shaped or of another dtype.
    """
    problems: dict[str, list[str]] = {"missing": [], "shape": [], "dtype": [], "unexpected": []}
    weights: dict[tuple[str, int, tuple[int, ...]], Weight] = {}
    numbers: dict[int, int] = {}
    used: set[str] = set()
    named: set[str] = set()
    for tensor, names, _ in tensor_names(module).values():
        named.update(names)
        stored = [name for name in names if index.resolve(name) is not None]
        used.update(stored)
        entry = index.resolve(stored[-1]) if stored else None  # load_state_dict copies in order: the last name wins
        if entry is None:
            problems["missing"].append(names[0])
        elif tuple(tensor.shape) != entry.shape:
            problems["shape"].append(f"{names[0]}: the model has {list(tensor.shape)}, the file {list(entry.shape)}")
        elif tensor.dtype != entry.dtype:
            stored_as = f"the model has {_short(tensor.dtype)}, the file {_short(entry.dtype)}"
            problems["dtype"].append(f"{names[0]}: {stored_as}")
        else:
            # Tensors without elements may share an offset with others: they are told apart by name.
            key = (str(entry.file), entry.offset, entry.shape) if entry.nbytes else (names[0], -1, entry.shape)
            weight = weights.setdefault(key, Weight(len(weights), names[0], entry))
            numbers[id(tensor)] = weight.index
    if strict:
        # Masks and position numbers that older versions of a model saved and newer ones compute.
        computed = {name for name, _ in module.named_buffers()} - named
        problems["unexpected"] = [name for name in index.names() if name not in used and name not in computed]
    if any(problems.values()):
        raise WeightsMismatchError(_describe(problems, index))
    return Matched(list(weights.values()), numbers)


def attach_slots(module: nn.Module, matched: Matched) -> None:
    """Turn every weight of the module into a stand-in. From here on the module holds no weight bytes.

    Raises:
        ModelError: a weight's memory is shared with a tensor that is not a weight.
    """
    for tensor, names, _ in list(tensor_names(module).values()):
        weight = matched.weights[matched.numbers[id(tensor)]]
        try:
            weight.slots.append(Slot(weight, tensor))
        except RuntimeError as error:
            raise ModelError(
                f"weight {names[0]!r} cannot be streamed, because another tensor shares its memory "
                f"(a view or a graph made before nb.stream()): {str(error).splitlines()[0]}"
            ) from error


def fixed_buffer_bytes(module: nn.Module) -> int:
    """Bytes of the buffers that live in memory throughout: the non-persistent ones."""
    total = 0
    seen: set[int] = set()
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name in child._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                total += buffer.nbytes if buffer.device.type != "meta" else 0
    return total


def is_materialised(module: nn.Module) -> bool:
    """Whether the module's own parameters have bytes (it is not a skeleton)."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.device.type == "cpu" for p in parameters)


def _describe(problems: dict[str, list[str]], index: WeightsIndex) -> str:
    titles = {
        "missing": "missing from the file",
        "unexpected": "in the file but not in the model",
        "shape": "wrong shape",
        "dtype": "wrong dtype (build the model with the file's dtype, or convert the file)",
    }
    parts = []
    for kind, names in problems.items():
        if names:
            shown = "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")
            parts.append(f"{len(names)} {titles[kind]}: {shown}")
    where = index.files[0] if index.files else "the weights file"
    return f"the weights in {where} are not this model's: " + " | ".join(parts)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
