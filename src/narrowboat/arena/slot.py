"""A weight, and the tensor objects through which the model sees it.

The parameter object the model holds stays the same object for ever; what it holds inside changes. While the weight
is in, that is a view of the arena made once; while it is out, a stand-in. Lists of parameters, ties, ``_flat_weights``
of an LSTM and references kept by the caller therefore stay right with nothing to be patched. Exchanging the two costs
about a microsecond (``torch._C._swap_tensor_impl``, which ``torch.utils.swap_tensors`` is made of).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from narrowboat.arena.standin import StandInParameter, StandInTensor, new_standin, tag, untag

if TYPE_CHECKING:
    from narrowboat.checkpoint import TensorEntry

_swap_impl = torch._C._swap_tensor_impl
_storage_uses = torch._C._storage_Use_Count
_tensor_uses: Callable[[torch.Tensor], int] = torch.Tensor._use_count  # type: ignore[attr-defined]


class WeightOwner(Protocol):
    """Who brings weights in on demand (the session's engine)."""

    def touching(self, weights: list[Weight]) -> AbstractContextManager[Any]:
        """Within the context the weights' bytes are in; yields ``tensor_of(slot)``."""


class Weight:
    """The bytes of one tensor of the weights file, and the slots that show them (several if tied).

    Attributes:
        index: its number, in order of the model's names.
        name: its first name in the model.
        entry: where it lies at rest.
        slots: the tensor objects of the model.
        owner: who loads it on demand; set by the session.
        device: where its bytes are when it is in.
        tiled: how it is used instead of as a whole, in words ("in 7 tiles"); empty if it is used as a whole.
        by_rows: who runs the operators that meet it, where only rows of it are ever in; set by the session.
    """

    __slots__ = ("by_rows", "device", "entry", "index", "name", "owner", "slots", "tiled")

    def __init__(self, index: int, name: str, entry: TensorEntry, tiled: str = "") -> None:
        self.index = index
        self.name = name
        self.entry = entry
        self.slots: list[Slot] = []
        self.owner: Any = None
        self.by_rows: Any = None
        self.device = torch.device("cpu")
        self.tiled = tiled


class Slot:
    """One parameter or buffer object of the model.

    Attributes:
        tensor: the object the model holds.
        other: the object that holds whichever of view and stand-in ``tensor`` does not.
        inside: whether ``tensor`` is the view at the moment.
        escaped: copies made because somebody kept a view (see ``take_out``).
    """

    __slots__ = ("_in_class", "_out_class", "_storage", "_version", "inside", "other", "tensor", "weight")

    def __init__(self, weight: Weight, tensor: torch.Tensor) -> None:
        self.weight = weight
        self.tensor = tensor
        self._in_class = type(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        self._out_class = StandInParameter if is_parameter else StandInTensor
        self.inside = False
        self._storage: Any = None
        self._version = 0
        # What the object held before (meta, or real memory) is let go here.
        _exchange(tensor, self._fresh_standin(), self._out_class, self._in_class)
        tag(tensor, self)
        self.other: torch.Tensor | None = None

    def bind(self, view: torch.Tensor) -> None:
        """Make ``view`` what the tensor will be while the weight is in. The weight has to be out."""
        assert not self.inside
        with torch.inference_mode(False):
            if issubclass(self._in_class, nn.Parameter):
                view = nn.Parameter(view, requires_grad=self.tensor.requires_grad)
        self._storage = view.untyped_storage()
        self._version = view._version
        tag(view, self)  # a reader in another thread may hold the object that is exchanged under it
        self.other = view

    def unbind(self) -> None:
        """Let go of the view; the weight has to be out."""
        self.other = self._storage = None

    @property
    def view(self) -> torch.Tensor:
        """The real tensor over the arena, whether in or out. Only while its bytes are held in."""
        view = self.tensor if self.inside else self.other
        assert view is not None
        return view

    def put_in(self) -> None:
        """Let the model see the view."""
        if not self.inside:
            _exchange(self.tensor, self.other, self._in_class, self._out_class)
            self.inside = True

    def take_out(self) -> bool:
        """Let the model see the stand-in; True if a view of the weight is still held by somebody else.

        The caller then moves the bytes aside with ``rescue`` before the arena's are written over.
        """
        if self.inside:
            _exchange(self.tensor, self.other, self._out_class, self._in_class)
            self.inside = False
        return self.kept

    @property
    def kept(self) -> bool:
        """Whether anybody but this slot refers to the view's bytes, or has written to them."""
        view = self.view
        # The storage is referred to by the view's own tensor and by ``_storage``.
        aliased = _storage_uses(self._storage._cdata) > 2 or _tensor_uses(view) > 1
        return aliased or view._version != self._version

    @property
    def written(self) -> bool:
        """Whether the weight was modified in place since it was bound, or through a view taken while it was out."""
        standin = self.other if self.inside else self.tensor
        # A view taken of the stand-in counts its writes there.
        return self.view._version != self._version or (standin is not None and standin._version != 0)

    def renew_standin(self) -> None:
        """Forget the writes counted by the stand-in; the weight has to be out."""
        if self.tensor._version != 0:
            _exchange(self.tensor, self._fresh_standin(), self._out_class, self._out_class)

    def rescue(self) -> int:
        """Move the bytes that others still refer to into memory of their own; returns how many.

        The storage, and with it every alias, gets a new place. The caller has to ``bind`` a fresh view afterwards.
        """
        nbytes = self._storage.nbytes()
        with torch.inference_mode(False):
            if hasattr(self._storage, "_swap_data_ptr_"):
                self._storage._swap_data_ptr_(self._storage.clone())
            else:  # public, but the memory comes from /dev/shm, which containers keep small
                self._storage.share_memory_()
        return int(nbytes)

    def reset(self) -> None:
        """Make the tensor a stand-in and let go of any view, whatever state an interruption has left them in."""
        if not torch._C._dispatch_keys(self.tensor).has(torch._C.DispatchKey.Python):
            _exchange(self.tensor, self._fresh_standin(), self._out_class, self._in_class)
        self.tensor.__class__ = self._out_class
        self.inside = False
        self.unbind()

    def release(self) -> None:
        """Turn the tensor back into an ordinary one on meta; the weight has to be out, and the session closed."""
        meta = torch.empty(self.weight.entry.shape, dtype=self.weight.entry.dtype, device="meta")
        if issubclass(self._in_class, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=self.tensor.requires_grad)
        _exchange(self.tensor, meta, self._in_class, self._out_class)
        untag(self.tensor)

    def _fresh_standin(self) -> torch.Tensor:
        entry = self.weight.entry
        flag = self.tensor.requires_grad
        return new_standin(self._out_class, entry.shape, entry.dtype, self.weight.device, flag)

    def empty(self) -> torch.Tensor:
        """What stands for a weight without elements, which has no bytes."""
        return torch.empty(self.weight.entry.shape, dtype=self.weight.entry.dtype, device=self.weight.device)

    def set_requires_grad(self, requires_grad: bool) -> None:
        """Set the flag on what is in and on what is out."""
        for tensor in (self.tensor, self.other):
            if tensor is not None:
                torch.Tensor.requires_grad_(tensor, requires_grad)


def _exchange(tensor: torch.Tensor, other: torch.Tensor | None, tensor_class: Any, other_class: Any) -> None:
    assert other is not None
    _swap_impl(tensor, other)
    tensor.__class__ = tensor_class
    other.__class__ = other_class
