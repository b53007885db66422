"""On which device a model is trained, and what a budget says for it and for the host."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.interface import Device
from narrowboat.arena.standin import is_streamed
from narrowboat.errors import UsageError
from narrowboat.quantities import parse_bytes
from narrowboat.stream.tiers import host_bytes


def device_of(model: nn.Module, given: str | torch.device | Device | None) -> Device | None:
    """The device that a model is trained on; None for the CPU.

    Args:
        model: with its parameters where they are to stay.
        given: what the caller said, as for ``open_device`` or "cpu"; None to go by the parameters.

    Raises:
        UsageError: the parameters are on several devices, or not on the one that was given; that is no device.
        NoDeviceError: there is no such device.
        DriverTooOldError: it cannot be used.
    """
    places = {parameter.device for parameter in model.parameters() if parameter.device.type != "meta"}
    on_gpu = sorted((place for place in places if place.type == "cuda"), key=str)
    if on_gpu and len(places) > 1:
        names = ", ".join(sorted(map(str, places)))
        raise UsageError(f"the model's parameters are on {names}: train_step trains a model on one device")
    if given is None:
        return open_device(on_gpu[0]) if on_gpu else None
    if str(given) == "cpu":
        if on_gpu:
            raise UsageError(f"device='cpu', and the model is on {on_gpu[0]}: leave device out, or move the model")
        return None
    found = open_device(given)
    for place in places:
        if place != found.torch_device:
            raise UsageError(
                f"device={str(given)!r}, and the model is on {place}: move it there before its optimizer is made "
                f"(model.to({str(found.torch_device)!r}))"
            )
    return found


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a budget says.

    Attributes:
        own: for the device that computes: an int, a string of bytes, or "auto".
        host: bytes of host memory that may be pinned for activations of a device; None where nothing was said.
    """

    own: int | str
    host: int | None = None

    @classmethod
    def of(cls, budget: Any, device: Device | None) -> Amounts:
        """From what the caller gave.

        Args:
            budget: an int or a string, for the device that computes; or a mapping with "cpu" and, where that is not
                the CPU, "cuda".
            device: the one that computes; None for the CPU.

        Raises:
            UsageError: a key that there is not, or no such size.
        """
        if not isinstance(budget, Mapping):
            return cls(budget)
        names = ("cpu",) if device is None else ("cuda", "cpu")
        by_name: dict[str, Any] = {}
        for key, value in budget.items():
            name = str(key)
            if device is not None and (name == device.name or name == str(device.torch_device) != "cpu"):
                name = "cuda"
            if name not in names:
                raise UsageError(_unknown(name, device))
            if name in by_name:
                raise UsageError(f"budget={dict(budget)!r} names one device twice")
            by_name[name] = value
        if device is None:
            if not by_name:
                raise UsageError("budget={} names no device: give {'cpu': '1.5GiB'}, or just the size")
            return cls(by_name["cpu"])
        host = by_name.get("cpu", "auto")
        return cls(by_name.get("cuda", "auto"), None if host == "auto" else _host_bytes(host))

    def host_bytes(self) -> int:
        """Bytes of host memory that may be pinned: what was said, or half of what the host can spare now."""
        return host_bytes(self.host, sys.maxsize)


def _host_bytes(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value == 0:
        return 0
    return parse_bytes(value, what="budget for cpu")


def _unknown(name: str, device: Device | None) -> str:
    if device is None and name.partition(":")[0] == "cuda":
        return (
            f"budget has {name!r}, and the model is on the CPU: move it to the GPU before its optimizer is made "
            "(model.to('cuda')), or give a budget for 'cpu'"
        )
    if device is not None and name.partition(":")[0] == "cuda":
        return f"budget has {name!r}, and the model is on {device.torch_device}: give its budget as 'cuda'"
    known = "'cpu'" if device is None else "'cuda' and 'cpu'"
    return f"budget has {name!r}, which is no device of this step: there {'is' if device is None else 'are'} {known}"


def check_weights(model: nn.Module, weights: object) -> None:
    """Refuse weights that are not in the device's memory.

    Raises:
        UsageError: some are on storage.
    """
    away = any(parameter.device.type == "meta" or is_streamed(parameter) for parameter in model.parameters())
    if away or weights is not None:
        raise UsageError(
            "weights on storage are trained on the CPU only: load them to the GPU (or leave weights= and device= out)"
        )


def check_batch(inputs: Any, targets: Any, model: nn.Module) -> None:
    """Refuse a batch that is elsewhere than the model; some of its tensors may be (lengths of sequences).

    Raises:
        UsageError: none of the inputs', or of the targets', tensors is where the model is.
    """
    place = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    for what, tree in (("inputs", inputs), ("targets", targets)) if place is not None else ():
        devices = _devices_of(tree_leaves(tree))
        if devices and place not in devices:
            raise UsageError(
                f"the batch's {what} are on {', '.join(sorted(map(str, devices)))}, and the model is on {place}: "
                f"move them there ({what}.to({str(place)!r}))"
            )


def _devices_of(leaves: Iterable[Any]) -> set[torch.device]:
    return {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"}
