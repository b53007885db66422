"""The life of a slab and its mirror through the real bindings and a fake driver, as a program for ``test_bindings``.

PyTorch's part of a CUDA device, its streams and events, is replaced by queues that are always empty: the fake driver
copies at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import torch

from narrowboat.arena.device.cuda import CudaDevice
from narrowboat.arena.device.mirror import Mirror
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.arena.slab import Slab
from narrowboat.errors import DeviceError, DeviceMemoryError, PinnedMemoryError

MIB = 1 << 20


class Queue:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


class Mark:
    def __init__(self, **options: Any) -> None: ...

    def record(self, stream: Queue) -> None: ...

    def synchronize(self) -> None: ...


def without_pytorchs_part() -> None:
    for name, stand_in in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "init": lambda: None,
        "get_device_name": lambda index: "Fake",
        "current_stream": lambda index: Queue(0),
        "is_current_stream_capturing": lambda: False,
        "ExternalStream": lambda handle, device: Queue(handle),
        "Event": Mark,
        "synchronize": lambda index: None,
    }.items():
        setattr(torch.cuda, name, stand_in)


def live(told: dict[str, Any]) -> None:
    device = CudaDevice()
    told["granularity"], told["unified"] = device.granularity, device.unified
    told["free at first"] = device.memory()[0]
    slab = DeviceSlab(device, 8 * MIB)
    told["free with a slab"] = device.memory()[0]

    values = torch.randint(0, 256, (8 * MIB,), dtype=torch.uint8)
    host = Slab(8 * MIB)
    host.tensor(0, torch.uint8, (8 * MIB,)).copy_(values)
    device.pin(host)
    told["in place"] = device.in_place(host) == host.address
    device.copy_in(slab.address, host.address, 8 * MIB, device.compute())  # across chunks, at once
    slab.copy(0, 5 * MIB, 1000)
    values[5 * MIB : 5 * MIB + 1000] = values[:1000].clone()

    def right() -> bool:
        return bytes(slab.bytes_at(0, 8 * MIB)) == values.numpy().tobytes()

    told["right"] = [right()]
    mirror = Mirror(slab, 7 * MIB)
    for nbytes in (1, None):
        mirror.evict(nbytes, save=True)
        told.setdefault("free after evicting", []).append(device.memory()[0])
    others = device.reserve(58 * MIB)
    taken = device.map(others, 58 * MIB)
    try:
        mirror.restore()
    except DeviceMemoryError as error:
        told["restore"] = str(error)
    told["out"] = mirror.out_bytes
    device.unmap(others, 58 * MIB, taken)
    device.unreserve(others, 58 * MIB)
    thread = threading.Thread(target=mirror.restore)  # which has no current context
    thread.start()
    thread.join()
    told["right"].append(right())
    mirror.verify()
    try:
        device.pin(host)
    except PinnedMemoryError as error:
        told["pin"] = str(error)
    device.unpin(host)
    mirror.close()
    slab.close()
    told["free in the end"], told["pinned in the end"] = device.memory()[0], device.pinned_bytes
    told["current context in the end"] = int(device.driver._module.cuCtxGetCurrent()[1])


def fail(told: dict[str, Any]) -> None:
    """The middle of mapping a slab, at every call and in two ways, and then no more."""
    device = CudaDevice()
    before = device.memory()[0]
    for name in ("cuMemCreate", "cuMemMap", "cuMemSetAccess"):
        for call in (1, 3):
            for code in (1, 2):
                slab = DeviceSlab(device, 8 * MIB, populate=False)
                os.environ["FAKE_FAIL"] = wish = f"{name}:{call}:{code}"
                try:
                    slab.hold([(0, 8 * MIB)])
                except DeviceError as error:
                    kept = before - device.memory()[0] + slab.mapped_bytes
                    told[wish] = [f"{type(error).__name__}: {error}", kept]
                slab.hold([(0, 8 * MIB)])
                told[wish].append(slab.mapped_bytes)
                slab.close()


def wrong(told: dict[str, Any]) -> None:
    """Whatever is wrong with a driver is told in the words of one error."""
    for setting in sys.argv[2:]:
        name, value = setting.split("=")
        os.environ[name] = value
        try:
            device = CudaDevice()
            device.memory()
            device.stream("copies")
        except DeviceError as error:
            told[setting] = f"{type(error).__name__}: {error}"
        del os.environ[name]


def leave(told: dict[str, Any]) -> None:
    global kept
    device = CudaDevice()
    slab = DeviceSlab(device, 8 * MIB)
    kept = (slab, Mirror(slab, 4 * MIB), device.stream("left open"))
    kept[1].evict(save=True)


if __name__ == "__main__":
    without_pytorchs_part()
    answer: dict[str, Any] = {}
    try:
        globals()[sys.argv[1]](answer)
    except DeviceError as error:
        answer["raised"] = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
