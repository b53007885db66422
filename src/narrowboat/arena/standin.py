"""Stand-ins: what is where a weight was while the weight is out.

A stand-in reports the real shape, strides, dtype, device and ``requires_grad``, because models ask for them
(``x.to(self.weight.device)``). The moment an operator touches it, the weight is loaded and the operator runs on the
weight itself. Nothing else can be done with a stand-in: there are no bytes behind it to be read by mistake.

It intercepts at the dispatcher (``__torch_dispatch__``) and not at the Python functions (``__torch_function__``):
``torch.overrides.has_torch_function`` has to stay false, or ``nn.TransformerEncoderLayer`` and
``nn.MultiheadAttention`` would leave the fast path that plain PyTorch takes, and change the last bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from narrowboat.errors import StreamedModelError

if TYPE_CHECKING:
    from narrowboat.arena.slot import Slot

_SLOT = "_narrowboat_slot"


def is_standin(value: object) -> bool:
    """Whether ``value`` is a weight that is out at the moment."""
    return isinstance(value, _StandIn)


def is_streamed(value: torch.Tensor) -> bool:
    """Whether ``value`` is a weight of a streamed model, in or out."""
    return _SLOT in value.__dict__


class _StandIn:
    """Behaviour shared by the two classes below (a parameter's and a buffer's)."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default and type(args[0]) is not TurnedStandIn:
            return lazy_alias(slot_of(args[0]))
        _refuse_writes(func, args, kwargs or {})
        leaves, spec = tree_flatten((args, kwargs or {}))
        # Weights that are in count too: making place for the others must not turn them into stand-ins.
        slots = [_slot_or_none(leaf) for leaf in leaves]
        for leaf, slot in zip(leaves, slots, strict=True):
            if slot is not None and slot.weight.by_rows is not None:
                return slot.weight.by_rows.run(func, args, kwargs or {}, leaf)
        weights = [slot.weight for slot in slots if slot is not None]
        with weights[0].owner.touching(weights) as tensor_of:
            real = [
                leaf if slot is None else _with_flag_of(leaf, tensor_of(slot))
                for leaf, slot in zip(leaves, slots, strict=True)
            ]
            real_args, real_kwargs = tree_unflatten(real, spec)
            with tracked_as_in_plain_calls(func):
                out = func(*real_args, **real_kwargs)
            # An operator with nothing to do (.float() of float32) returns its argument: the view must not get out.
            handed_in = {
                id(view): leaf for view, leaf, slot in zip(real, leaves, slots, strict=True) if slot is not None
            }
            if isinstance(out, (list, tuple)):
                return type(out)(handed_in.get(id(value), value) for value in out)
            return handed_in.get(id(out), out)

    # The C++ entry points that would look for bytes behind the tensor.
    def data_ptr(self) -> int:
        raise StreamedModelError(
            f"{_name(self)} is streamed and has no fixed bytes to point at; copy it with .clone() first"
        )

    def untyped_storage(self) -> Any:
        raise StreamedModelError(
            f"{_name(self)} is streamed and has no storage of its own; copy it with .clone() first"
        )

    storage = untyped_storage

    def numpy(self, *, force: bool = False) -> Any:
        return self.clone().detach().numpy(force=force)  # type: ignore[attr-defined]

    def __array__(self, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        array = self.clone().detach().numpy()  # type: ignore[attr-defined]
        return array if dtype is None else array.astype(dtype)

    def tolist(self) -> Any:
        return self.clone().detach().tolist()  # type: ignore[attr-defined]

    @property
    def data(self) -> torch.Tensor:
        return self if isinstance(self, TurnedStandIn) else lazy_alias(slot_of(self))

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise StreamedModelError(_read_only(_name(self)))

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        slot_of(self).set_requires_grad(requires_grad)
        return self

    def share_memory_(self) -> Any:
        raise StreamedModelError(f"{_name(self)} is streamed and cannot move to shared memory")

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"<{_name(self)}: {tuple(self.shape)} {self.dtype}, streamed, out at the moment>"  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: Any) -> Any:
        raise StreamedModelError(
            f"{_name(self)} is streamed: a deep copy would need the bytes that the budget does not have; "
            "build a second model from the factory instead"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # One weight at a time passes through memory, so torch.save(model.state_dict()) writes the real bytes.
        return self.clone().detach().__reduce_ex__(protocol)  # type: ignore[attr-defined]


class StandInTensor(_StandIn, torch.Tensor):  # type: ignore[misc]
    """A buffer, or a detached alias, that is out."""


class StandInParameter(_StandIn, nn.Parameter):  # type: ignore[misc]
    """A parameter that is out."""


class TurnedStandIn(StandInTensor):
    """A stack of matrices of which only rows are ever in, with the last two dimensions exchanged."""

    @staticmethod
    def of(slot: Slot) -> torch.Tensor:
        """The stack of ``slot``, turned."""
        *outer, rows, columns = slot.weight.entry.shape
        strides = (rows * columns,) * len(outer) + (1, columns)
        shape, dtype = (*outer, columns, rows), slot.weight.entry.dtype
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                TurnedStandIn, shape, strides=strides, dtype=dtype, device=slot.weight.device
            )
        tag(made, slot)
        return made


def slot_of(tensor: Any) -> Slot:
    """The slot a stand-in (or a streamed weight) belongs to."""
    slot: Slot = tensor.__dict__[_SLOT]
    return slot


def _slot_or_none(value: Any) -> Slot | None:
    return value.__dict__.get(_SLOT) if isinstance(value, torch.Tensor) else None


def tag(tensor: torch.Tensor, slot: Slot) -> None:
    """Remember on the tensor object which slot it belongs to."""
    tensor.__dict__[_SLOT] = slot


def untag(tensor: torch.Tensor) -> None:
    """Forget what ``tag`` noted."""
    tensor.__dict__.pop(_SLOT, None)


def new_standin(
    cls: type[torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    requires_grad: bool,
) -> torch.Tensor:
    """A stand-in without a slot yet; contiguous strides, no bytes."""
    with torch.inference_mode(False):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=requires_grad)


def lazy_alias(slot: Slot) -> torch.Tensor:
    """What ``.detach()``, ``.data`` and ``state_dict()`` give for a weight that is out: it loads when touched."""
    weight = slot.weight
    alias = new_standin(StandInTensor, weight.entry.shape, weight.entry.dtype, weight.device, False)
    tag(alias, slot)
    return alias


def _with_flag_of(standin: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    # For a detached alias the flag is off where the parameter's is on; matmul folds its batch by it.
    return view.detach() if view.requires_grad and not standin.requires_grad else view


def tracked_as_in_plain_calls(func: Any) -> AbstractContextManager[Any]:
    """Let an operator see the same ``requires_grad`` on the views it makes inside as it would in a plain call.

    In ``inference_mode`` composite operators arrive here whole, and PyTorch no longer tracks views below this point:
    ``linear`` would see ``weight.t()`` without the weight's flag, fold its batch differently and change the last bits.
    Operators that give out views themselves are tracked by the caller.
    """
    if not torch.is_inference_mode_enabled() or _gives_views(func):
        return nullcontext()
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.ADInplaceOrView)
    guard: AbstractContextManager[Any] = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), excluded
    )
    return guard


@cache
def _gives_views(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "ADInplaceOrView"))


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not func._schema.is_mutable:
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if isinstance(value, _StandIn):
            raise StreamedModelError(_read_only(_name(value)))


def _read_only(name: str) -> str:
    return (
        f"{name} is streamed from its weights file and cannot be written: change the weights before nb.stream(), "
        "or close the session and load the model in full; if a pass itself writes to it, give nb.stream() example "
        "inputs, so that it is known beforehand and stays in memory"
    )


def _name(tensor: Any) -> str:
    return f"weight {slot_of(tensor).weight.name!r}"
