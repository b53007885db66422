"""What a step on a device has for its activations: pinned host memory, and storage behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from narrowboat.arena.device.interface import Device
from narrowboat.errors import PinnedMemoryError
from narrowboat.quantities import format_bytes
from narrowboat.train.device.bandwidth import measure_copies
from narrowboat.train.device.choice import Amounts
from narrowboat.train.device.spill import DeviceSpillPool
from narrowboat.train.measure.chain import Rates
from narrowboat.train.spill import SpillPool

log = logging.getLogger("narrowboat")
_LEAST_IN_FLIGHT, _MOST_IN_FLIGHT = 16 << 20, 256 << 20
_LEAST_HOST = 1 << 20
_IN_FLIGHT_SHARE = 32  # of the budget, as it is when the step is made: some activations, so that copies have no gaps


def open_pool(
    device: Device,
    amounts: Amounts,
    budget: int,
    behind: SpillPool | None,
    rates: Rates,
    tell: Callable[[str], None] = log.warning,
) -> tuple[DeviceSpillPool | None, Rates, str]:
    """The pool for a device's activations, its rates beside those of the folder, and why there is none ("" if one is).

    Args:
        device: that computes.
        amounts: what may be pinned.
        budget: bytes of the device.
        behind: for what does not fit; None for no storage. Closed where there is no pool.
        rates: of it.
        tell: is told where nobody said how much may be pinned, and pinning is refused.

    Raises:
        PinnedMemoryError: pinning is refused, and it was asked for.
    """
    host, reason = amounts.host_bytes(), ""
    if host < _LEAST_HOST:
        reason = f"the budget for cpu is {format_bytes(host)}"
    elif device.unified:
        reason = f"{device.name} computes in the host's memory, so nothing would be gained"
    else:
        try:
            write, read = measure_copies(device)
        except PinnedMemoryError as error:
            if amounts.host is not None:
                raise
            reason = str(error)
            tell(f"activations stay on the device: {reason}")
    if reason:
        if behind is not None:
            behind.close()
        return None, Rates(), reason
    in_flight = min(max(budget // _IN_FLIGHT_SHARE, _LEAST_IN_FLIGHT), _MOST_IN_FLIGHT)
    pool = DeviceSpillPool(device, host, behind, in_flight=in_flight)
    log.info(
        "activations of %s: %s/s to pinned memory, %s/s back", device.name, format_bytes(write), format_bytes(read)
    )
    return pool, replace(rates, host_write=1 / write, host_read=1 / read, host_room=pool.room_for), ""
