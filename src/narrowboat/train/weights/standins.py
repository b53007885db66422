"""Stand-ins that stay: a weight on storage is one throughout training, in forward and in backward.

What autograd saves of such a weight is the stand-in, never its bytes. A view of a stand-in (``linear`` makes
``weight.t()``, and autograd saves that) is a stand-in too: it remembers how it was made, and the weight is loaded
when an operator needs bytes. So nothing that outlives an operator points into the window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from narrowboat.arena.slot import Slot, Weight
from narrowboat.arena.standin import StandInParameter, StandInTensor, slot_of, tag, tracked_as_in_plain_calls
from narrowboat.errors import StreamedModelError

if TYPE_CHECKING:
    from narrowboat.arena.standin import _StandIn
else:
    _StandIn = object

_VIEWS = "_narrowboat_views"
# They look at a tensor's shape and dtype only: an optimizer makes its state with them.
_SHAPE_ONLY = {
    getattr(torch.ops.aten, name)
    for name in (
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_empty",
        "new_empty_strided",
        "new_zeros",
        "new_ones",
        "new_full",
    )
}
_Step = tuple[Any, tuple[Any, ...], dict[str, Any], int | None]  # operator, further arguments, which of its results


class _Lazy(_StandIn):
    """What the two classes below add to stand-ins."""

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view and args and isinstance(args[0], _Lazy):
            # Only in inference_mode do composite operators arrive whole. Those that may give a view are taken apart.
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
                return func.decompose(*args, **kwargs)
            view = _view_of(func, args, kwargs)
            if view is not None:
                return view
        if func.overloadpacket in _SHAPE_ONLY:
            return func(_on_meta(args[0]), *args[1:], **{**kwargs, "device": kwargs.get("device") or "cpu"})
        _refuse_writes(func, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        standins = [leaf for leaf in leaves if isinstance(leaf, _Lazy)]
        weights = [slot_of(each).weight for each in standins]
        with weights[0].owner.touching(weights) as tensor_of:
            return _run(func, leaves, spec, tensor_of)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value is self:
            return  # module.to() of what the weight is already
        raise StreamedModelError(_read_only(self))

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        shape, dtype = tuple(self.shape), self.dtype  # type: ignore[attr-defined]
        return f"<weight {slot_of(self).weight.name!r}: {shape} {dtype}, on storage>"


class LazyTensor(_Lazy, StandInTensor):  # type: ignore[misc]
    """A view of a weight on storage, or a detached alias."""


class LazyParameter(_Lazy, StandInParameter):  # type: ignore[misc]
    """A parameter on storage."""


class LazySlot(Slot):
    """One parameter of the model whose weight is on storage. While it is out it is a ``LazyParameter``."""

    __slots__ = ()

    def __init__(self, weight: Weight, tensor: torch.Tensor) -> None:
        super().__init__(weight, tensor)
        self._out_class = LazyParameter if isinstance(tensor, nn.Parameter) else LazyTensor
        tensor.__class__ = self._out_class

    @property
    def shared(self) -> bool:
        """Whether anybody but this slot refers to the bytes of its view."""
        # The storage is referred to by the view's own tensor and by ``_storage``.
        return torch._C._storage_Use_Count(self._storage._cdata) > 2 or self.view._use_count() > 1  # type: ignore[attr-defined]


def _view_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a view operator gives for a stand-in: a stand-in, or several; None where it gives no view."""
    base = args[0]
    # Shapes are worked out on meta, and by no mode that looks on: it would take them for tensors of the model.
    with torch._C._DisableTorchDispatch(), torch.inference_mode(False):
        meta = _on_meta(base)
        shapes = func(meta, *args[1:], **kwargs)
    several = isinstance(shapes, (list, tuple))
    views = []
    for i, shape in enumerate(shapes if several else [shapes]):
        if shape.untyped_storage()._cdata != meta.untyped_storage()._cdata or shape.is_conj() or shape.is_neg():
            return None
        views.append(_lazy_view(base, shape, (func, args[1:], kwargs, i if several else None)))
    return type(shapes)(views) if several else views[0]


def _on_meta(standin: Any) -> torch.Tensor:
    """A tensor of the same shape, strides and offset without bytes."""
    reach = sum((size - 1) * step for size, step in zip(standin.shape, standin.stride(), strict=True))
    meta = torch.empty(max(standin.storage_offset() + reach + 1, 0), dtype=standin.dtype, device="meta")
    return meta.as_strided(standin.shape, standin.stride(), standin.storage_offset())


def _lazy_view(base: Any, shape: torch.Tensor, step: _Step) -> torch.Tensor:
    with torch.inference_mode(False):
        view = torch.Tensor._make_wrapper_subclass(
            LazyTensor,
            shape.shape,
            strides=shape.stride(),
            storage_offset=shape.storage_offset(),
            dtype=shape.dtype,
            device=torch.device("cpu"),
        )
    tag(view, slot_of(base))
    view.__dict__[_VIEWS] = (*base.__dict__.get(_VIEWS, ()), step)
    return view


def _real(standin: Any, weight: torch.Tensor) -> torch.Tensor:
    """The tensor over the window that a stand-in stands for."""
    # matmul folds its batch by the flag: it has to be the stand-in's.
    if weight.requires_grad and not standin.requires_grad:
        weight = weight.detach()
    for func, args, kwargs, which in standin.__dict__.get(_VIEWS, ()):
        made = func(weight, *args, **kwargs)
        weight = made if which is None else made[which]
    return weight


def _run(func: Any, leaves: list[Any], spec: Any, tensor_of: Any) -> Any:
    real = [_real(leaf, tensor_of(slot_of(leaf))) if isinstance(leaf, _Lazy) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(real, spec)
    with tracked_as_in_plain_calls(func):
        out = func(*args, **kwargs)
    # An operator with nothing to do returns its argument. (Other views that get out are moved to memory of their own.)
    handed_in = {id(view): leaf for view, leaf in zip(real, leaves, strict=True) if isinstance(leaf, _Lazy)}
    if isinstance(out, (list, tuple)):
        return type(out)(handed_in.get(id(value), value) for value in out)
    return handed_in.get(id(out), out)


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not func._schema.is_mutable:
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, _Lazy):
                raise StreamedModelError(_read_only(each))


def _read_only(standin: Any) -> str:
    return (
        f"weight {slot_of(standin).weight.name!r} is on storage during training and cannot be written in place: only "
        "the optimizer of the training step changes weights that are trained on storage"
    )
