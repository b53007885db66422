"""Budgets of several memories: ``budget={"cuda": "6GiB", "cpu": "8GiB"}``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from narrowboat.arena.device.interface import Device
from narrowboat.errors import DeviceMemoryError, UsageError
from narrowboat.machine.memory import memory_limits
from narrowboat.quantities import format_bytes, parse_bytes

log = logging.getLogger("narrowboat")
Budget = int | str | Mapping[str | int, int | str]
_HOST_SHARE = 0.5  # of what the host can spare, for its cache, where no number is given


def split_budget(budget: Budget, device: Device | None) -> tuple[int | str, int | None]:
    """``(execution device's budget, bytes of pinned host memory or None)``.

    Args:
        budget: a number or string for the execution device; or one each for it and for ``"cpu"``. The device goes by
            its kind (``"cuda"``), with its number (``"cuda:0"``), or by its number alone, as in ``max_memory``.
        device: the execution device; None for the processor.

    Raises:
        UsageError: a name that is no memory of this session, or none for the execution device.
        QuantityError: a value is no size.
    """
    if not isinstance(budget, Mapping):
        return budget, None
    own = {"cpu"} if device is None else _names(device)
    known = own | {"cpu"}
    for name in budget:
        if name not in known:
            raise UsageError(
                f"budget has {name!r}, which is no memory of this session: give "
                + " and ".join(repr(n) for n in sorted(known, key=str) if not isinstance(n, int))
            )
    given = [name for name in budget if name in own]
    if len(given) != 1:
        told = " or ".join(repr(n) for n in sorted(own, key=str))
        raise UsageError(f"budget must name the device the model runs on once: {told}")
    main = budget[given[0]]
    if device is None:
        return main, None
    if device.unified and "cpu" in budget:
        raise UsageError(f"{device.name} shares the host's memory: give one budget, for the device")
    return main, parse_bytes(budget["cpu"], what="budget for cpu") if "cpu" in budget else None


def _names(device: Device) -> set[str | int]:
    kind, index = device.torch_device.type, device.torch_device.index or 0
    return {device.name} if kind == "cpu" else {kind, f"{kind}:{index}", index}


def host_bytes(asked: int | None, useful: int) -> int:
    """Bytes of pinned host memory: what is of use, within what was asked, or half of what the host can spare now."""
    if asked is not None:
        return min(asked, useful)
    found = min(useful, int(memory_limits().available * _HOST_SHARE))
    log.info("budget for cpu: %s", format_bytes(found))
    return found


def new_budget(budget: Budget, device: Device | None, held: Callable[[], int]) -> int | str:
    """What a session's budget is to be, of its execution device.

    Args:
        budget: as for ``split_budget``.
        device: the execution device; None for the processor.
        held: asked for the bytes of its memory that the session holds already.

    Raises:
        UsageError: ``"auto"`` on a device, or a number for the host, which is fixed when streaming begins.
        DeviceMemoryError: the device has no such memory free.
        QuantityError: it is no size.
    """
    main, host = split_budget(budget, device)
    if host is not None:
        raise UsageError("the budget for cpu is fixed when streaming begins: give a new one for the device alone")
    if device is None:
        return main
    if main == "auto":
        raise UsageError("budget='auto' follows the host's memory: give a number of bytes for a device")
    nbytes = parse_bytes(main, what="budget")
    check_free(device, nbytes, held())
    return nbytes


def check_free(device: Device, nbytes: int, held: int = 0) -> None:
    """Before anything is taken.

    Args:
        held: bytes of it that are the session's already.

    Raises:
        DeviceMemoryError: the budget is above what the device has free.
    """
    free, total = device.memory()
    free += held
    if device.unified or nbytes <= free:
        return
    raise DeviceMemoryError(
        f"budget {format_bytes(nbytes)} is above the {format_bytes(free)} that {device.name} has free of "
        f"{format_bytes(total)}: lower the budget, or end what else uses the device"
    )
