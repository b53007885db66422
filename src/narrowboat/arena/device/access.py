"""Every operator's use of a device's bytes, told to its proof of order: for tests of what runs on an emulated device.

A dispatch mode sees each operator before it runs. The bytes of its tensors that lie in the device's addresses are
read then, by a kernel on the calling thread's stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.standin import is_standin


class AccessWatch(TorchDispatchMode):
    """While it is entered, operators of this thread are proved against ``device.order``.

    Args:
        device: the one whose tensors to look for.

    Attributes:
        reads: uses of the device's bytes that were seen.
    """

    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()
        self._device = device
        self.reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        if any(is_standin(leaf) for leaf in leaves):
            return NotImplemented  # the operator that its stand-in runs on the weight itself comes here again
        for leaf in leaves:
            if type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout is torch.strided and leaf.numel():
                address, nbytes = leaf.data_ptr(), leaf.untyped_storage().nbytes()
                if self._device.owns(address):
                    self.reads += 1
                    self._device.kernel_reads(leaf.untyped_storage().data_ptr(), nbytes)
        return func(*args, **(kwargs or {}))
