"""Tensors on their way from one stage to the next: storages once, views with their strides.

Views that share a storage share it again on arrival, so that an operator that writes to one is seen in the others;
strides and the alignment of 64 bytes stay, because kernels choose their path by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_ALIGN = 64  # bytes


@dataclass(frozen=True, slots=True)
class View:
    """One tensor: which storage, and how it lies in it (in elements, from the beginning of what was sent)."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Message:
    """What crosses one cut for one input.

    Attributes:
        views: by slot.
        storages: bytes.
    """

    views: dict[int, View]
    storages: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(int(storage.nbytes) for storage in self.storages)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes ``[begin, end)`` of its storage that a tensor lies in, ``begin`` at a multiple of 64."""
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    if tensor.numel() == 0:
        return begin, begin
    last = sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin // _ALIGN * _ALIGN, begin + (last + 1) * size


def pack(tensors: Mapping[int, torch.Tensor]) -> Message:
    """A message that refers to the tensors' own bytes: serialize it before they change."""
    spans: dict[int, tuple[int, int, torch.Tensor]] = {}
    for tensor in tensors.values():
        key = tensor.untyped_storage()._cdata
        begin, end = span(tensor)
        if key in spans:
            begin, end = min(begin, spans[key][0]), max(end, spans[key][1])
        spans[key] = begin, end, tensor
    numbers = {key: number for number, key in enumerate(spans)}
    storages = []
    for begin, end, tensor in spans.values():
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), begin, (end - begin,), (1,))
        storages.append(whole.numpy())
    views = {}
    for slot, tensor in tensors.items():
        key = tensor.untyped_storage()._cdata
        offset = int(tensor.storage_offset()) - spans[key][0] // tensor.element_size()
        views[slot] = View(numbers[key], tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), offset)
    return Message(views, tuple(storages))


def unpack(message: Message) -> dict[int, torch.Tensor]:
    """The tensors, in memory of their own."""
    storages = []
    for sent in message.storages:
        here = torch.empty(int(sent.nbytes), dtype=torch.uint8)
        here.numpy()[:] = np.frombuffer(sent, dtype=np.uint8)
        storages.append(here.untyped_storage())
    return {
        slot: torch.empty(0, dtype=view.dtype).set_(storages[view.storage], view.offset, view.shape, view.stride)
        for slot, view in message.views.items()
    }
