"""Which device a description means: ``cpu``, ``cuda``, ``cuda:1``; and, for tests, an emulated one."""

from __future__ import annotations

from dataclasses import dataclass

from narrowboat.errors import QuantityError
from narrowboat.quantities import parse_bytes

_FORM = "emulated:CAPACITY[:BYTES_PER_SECOND[:CHUNK]]"


@dataclass(frozen=True)
class DeviceChoice:
    """One device.

    Attributes:
        kind: "cpu", "cuda" or "emulated".
        index: of the GPU; None for the current one.
        capacity: bytes of memory of an emulated one.
        bandwidth: bytes per second that it copies; None for as fast as memory does.
        granularity: bytes of its chunks; None for the usual.
    """

    kind: str
    index: int | None = None
    capacity: int = 0
    bandwidth: int | None = None
    granularity: int | None = None


def parse_device(text: str) -> DeviceChoice:
    """What a name means. Nothing is looked for: that there is such a device is another question.

    An emulated device is for testing only: it computes on the processor, in memory that is counted as a device's.
    ``emulated:64MiB:200MB:64KiB`` has 64 MiB, which come and go in chunks of 64 KiB, and is reached by a bus of
    200 MB per second.

    Raises:
        ValueError: it is no device's name.
    """
    kind, _, rest = str(text).strip().partition(":")
    if kind == "cpu" and not rest:
        return DeviceChoice("cpu")
    if kind == "cuda" and (not rest or rest.isdecimal()) and not str(text).strip().endswith(":"):
        return DeviceChoice("cuda", int(rest) if rest else None)
    if kind != "emulated":
        raise ValueError(f"{text!r} is no device: use cpu, cuda or cuda:N")
    parts = rest.split(":")
    if not 1 <= len(parts) <= 3:
        raise ValueError(f"{text!r} is no emulated device: {_FORM}")
    try:
        sizes = [parse_bytes(part, what="size") for part in parts]
    except QuantityError as error:
        raise ValueError(f"{text!r} is no emulated device, {_FORM}: {str(error).removeprefix('size ')}") from error
    capacity, bandwidth, granularity = (*sizes, None, None)[:3]
    if granularity is not None and granularity % 4096:
        raise ValueError(f"{text!r}: chunks are whole pages of 4096 bytes, not {granularity}")
    return DeviceChoice("emulated", None, capacity or 0, bandwidth, granularity)
