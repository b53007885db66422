"""What the CUDA device asks of the driver, call by call: order, sizes, and what is undone after a failure."""

from __future__ import annotations

import ctypes
import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.mirror import Mirror
from narrowboat.arena.device.slab import DeviceSlab, InPlaceSlab
from narrowboat.arena.slab import Slab
from narrowboat.errors import (
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    NoDeviceError,
    PinnedMemoryError,
    UsageError,
)

MIB = 1 << 20
BASE = 1 << 40
CHUNK = 2 * MIB
MAP = [
    f"cuMemCreate({CHUNK}, prop, 0)",
    f"cuMemMap({BASE}, {CHUNK}, 0, 1, 0)",
    f"cuMemSetAccess({BASE}, {CHUNK}, [CUmemAccessDesc], 1)",
]


def test_what_memory_is_asked_for(fake: SimpleNamespace) -> None:
    prop, access = fake.device.driver._property, fake.device.driver._access
    real = fake.module._real
    assert prop.type == real.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    assert prop.location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    assert (prop.location.id, prop.allocFlags.gpuDirectRDMACapable) == (0, 1)
    assert access.location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    assert access.location.id == 0
    assert access.flags == real.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE


def test_map_and_unmap(fake: SimpleNamespace) -> None:
    device = fake.device
    assert device.granularity == CHUNK
    address = device.reserve(4 * CHUNK)
    handle = device.map(address, CHUNK)
    assert device.memory() == (62 * MIB, 64 * MIB)
    device.unmap(address, CHUNK, handle)
    device.unreserve(address, 4 * CHUNK)
    assert fake.log == [
        f"cuMemAddressReserve({4 * CHUNK}, 0, 0, 0)",
        *MAP,
        f"cuMemUnmap({BASE}, {CHUNK})",
        "cuMemRelease(1)",
        f"cuMemAddressFree({BASE}, {4 * CHUNK})",
    ]
    assert device.memory() == (64 * MIB, 64 * MIB)


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        ("cuMemCreate", [f"{MAP[0]} fails with 2"]),
        ("cuMemMap", [MAP[0], f"{MAP[1]} fails with 2", "cuMemRelease(1)"]),
        ("cuMemSetAccess", [*MAP[:2], f"{MAP[2]} fails with 2", f"cuMemUnmap({BASE}, {CHUNK})", "cuMemRelease(1)"]),
    ],
)
def test_a_map_that_fails_in_the_middle_leaves_nothing(fake: SimpleNamespace, failing: str, calls: list[str]) -> None:
    fake.module.failing[failing, 1] = 2
    with pytest.raises(
        DeviceMemoryError, match=r"cannot have 2\.00 MiB more of device memory.* of 64\.0 MiB are free"
    ):
        fake.device.map(BASE, CHUNK)
    assert fake.log == calls
    assert fake.device.memory()[0] == 64 * MIB
    fake.device.map(BASE, CHUNK)  # and the next one works


def test_when_undoing_fails_too_the_first_failure_is_told(fake: SimpleNamespace) -> None:
    fake.module.failing |= {("cuMemMap", 1): 2, ("cuMemRelease", 1): 1}
    with pytest.raises(DeviceMemoryError, match="cannot have"):
        fake.device.map(BASE, CHUNK)


def test_what_cannot_be_unmapped_is_kept_and_can_be_unmapped_later(fake: SimpleNamespace) -> None:
    slab = DeviceSlab(fake.device, CHUNK)
    fake.module.failing["cuMemUnmap", 1] = 1
    fake.log.clear()
    with pytest.raises(DeviceError, match="cannot unmap"):
        slab.release([(0, CHUNK)])
    assert "cuMemRelease(1)" not in fake.log
    assert (slab.mapped_bytes, slab.held) == (CHUNK, [(0, CHUNK)])
    slab.release([(0, CHUNK)])
    assert (slab.mapped_bytes, fake.log[-1]) == (0, "cuMemRelease(1)")


def test_giving_back_to_a_lost_device_is_silent(fake: SimpleNamespace) -> None:
    slab, host = DeviceSlab(fake.device, CHUNK, populate=True), Slab(4096)
    fake.device.pin(host)
    for name in ("cuMemUnmap", "cuMemRelease", "cuMemAddressFree", "cuMemHostUnregister", "cuMemGetInfo"):
        fake.module.failing[name, 1] = 700
    fake.device.unpin(host)
    slab.close()
    assert slab.address == 0
    with pytest.raises(DeviceLostError):
        fake.device.memory()


def test_a_slab_on_a_device_that_was_lost_can_be_closed(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab, in_place = DeviceSlab(fake.device, CHUNK, populate=True), InPlaceSlab(fake.device, 4096)
    mirror = Mirror(slab, CHUNK)

    def lost(index: int) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLostError):
        slab.release([(0, CHUNK)])
    mirror.close()
    slab.close()
    in_place.close()
    assert (slab.address, slab.mapped_bytes, fake.device.pinned_bytes) == (0, 0, 0)


def test_a_slab_that_runs_out_of_memory_in_the_middle_gives_back_what_it_got(fake: SimpleNamespace) -> None:
    fake.module.failing["cuMemCreate", 3] = 2
    with pytest.raises(DeviceMemoryError):
        DeviceSlab(fake.device, 4 * CHUNK, populate=True)
    assert fake.device.memory()[0] == 64 * MIB
    assert fake.log[-1] == f"cuMemAddressFree({BASE}, {4 * CHUNK})"


# -- host memory -----------------------------------------------------------------------------------


def test_pinning(fake: SimpleNamespace) -> None:
    host = Slab(10000)
    fake.device.pin(host)
    assert fake.device.pinned_bytes == 12288
    assert fake.device.in_place(host) == host.address
    fake.device.unpin(host)
    fake.device.unpin(host)
    assert fake.log == [
        f"cuMemHostRegister({host.address}, 12288, 3)",
        f"cuMemHostGetDevicePointer({host.address}, 0)",
        f"cuMemHostUnregister({host.address})",
    ]


def test_pinning_refused_keeps_nothing(fake: SimpleNamespace) -> None:
    fake.module.failing["cuMemHostRegister", 1] = 2
    with pytest.raises(PinnedMemoryError, match="lower the budget for cpu"):
        InPlaceSlab(fake.device, 4096)
    assert fake.device.pinned_bytes == 0


def test_pinned_addresses_stay_taken_until_they_are_unpinned(fake: SimpleNamespace) -> None:
    host = Slab(1 << 20)
    host.bytes_at(0, 5)[:] = b"there"
    address = host.address
    fake.device.pin(host)
    host.close()
    del host
    gc.collect()
    assert ctypes.string_at(address, 5) == b"there"


# -- streams and copies ----------------------------------------------------------------------------


def test_copies_go_to_their_stream_and_pytorchs_default_is_the_legacy_one(fake: SimpleNamespace) -> None:
    device, copies = fake.device, fake.device.stream("copies")
    device.copy_in(1, 2, 3, copies)
    device.copy_out(4, 5, 6, copies)
    device.copy_within(7, 8, 9, device.compute())
    device.copy_in(1, 2, 0, copies)
    assert fake.log == [
        "cuStreamCreate(1)",
        "cuMemcpyHtoDAsync(1, 2, 3, 5000)",
        "cuMemcpyDtoHAsync(4, 5, 6, 5000)",
        "cuMemcpyDtoDAsync(7, 8, 9, 1)",
    ]


def test_a_stream_goes_with_its_last_reference(fake: SimpleNamespace) -> None:
    copies = fake.device.stream("copies")
    event = copies.record()
    del copies
    gc.collect()
    assert fake.log[-1] == "cuStreamDestroy(5000)"
    assert event.done()


def test_streams_of_the_same_queue_are_equal(fake: SimpleNamespace) -> None:
    assert fake.device.compute() == fake.device.compute()
    assert hash(fake.device.compute()) == hash(fake.device.compute())
    assert fake.device.compute() != fake.device.stream("copies")
    assert fake.device.compute() != 0


def test_events(fake: SimpleNamespace) -> None:
    one, two = fake.device.compute(), fake.device.stream("copies")
    begin, end = one.record(timed=True), two.record()
    assert begin.event.options == {"enable_timing": True, "blocking": True}
    assert end.event.options == {"enable_timing": False, "blocking": True}
    two.wait(begin)
    end.wait()
    one.synchronize()
    assert end.seconds_since(begin) == 0.25
    assert fake.log == [
        "cuStreamCreate(1)",
        "event 1 on stream 0",
        "event 2 on stream 5000",
        "stream 5000 waits for event 1",
        "host waits for event 2",
        "host waits for stream 0",
    ]


def test_a_threads_current_context_is_left_as_it_was(fake: SimpleNamespace) -> None:
    fake.module.current = [0, 123]  # another device's
    seen: list[list[int]] = []
    original = fake.module._answer

    def watched(name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "cuMemHostRegister":
            seen.append(list(fake.module.current))
        return original(name, arguments)

    fake.module._answer = watched
    host = Slab(4096)
    fake.device.pin(host)
    assert (seen, fake.module.current) == ([[0, 123, 77]], [0, 123])
    fake.module.failing["cuMemHostRegister", 2] = 2
    with pytest.raises(PinnedMemoryError):
        fake.device.pin(Slab(4096))
    assert fake.module.current == [0, 123]
    fake.device.unpin(host)
    fake.module.current = [77]  # already ours: nothing is pushed
    fake.device.pin(host)
    assert (seen[-1], fake.module.current) == ([77], [77])
    fake.device.unpin(host)
    fake.module.current = [0]


def test_while_the_interpreter_ends_nothing_is_given_back(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = fake.device.map(BASE, CHUNK)
    fake.log.clear()
    with monkeypatch.context() as patch:
        patch.setattr("narrowboat.arena.device.driver.sys.is_finalizing", lambda: True)
        fake.device.unmap(BASE, CHUNK, handle)
        fake.device.unreserve(BASE, CHUNK)
    assert fake.log == []


def test_what_a_finalizer_gives_back_waits_until_a_capture_is_over(fake: SimpleNamespace) -> None:
    slab, mirrored = DeviceSlab(fake.device, CHUNK), DeviceSlab(fake.device, CHUNK)
    mirror = Mirror(mirrored, CHUNK)
    mirror.cycle = mirror  # type: ignore[attr-defined]  # for the collector, with its stream
    del slab
    assert fake.log[-1] == f"cuMemAddressFree({BASE}, {CHUNK})"
    fake.capturing = True
    fake.log.clear()
    del mirror, mirrored
    gc.collect()
    assert fake.log == ["cuStreamDestroy(5000)"]
    assert fake.device.memory()[0] == 62 * MIB
    fake.capturing = False
    assert fake.device.memory()[0] == 64 * MIB
    assert sorted(line.partition("(")[0] for line in fake.log) == [
        "cuMemAddressFree",
        "cuMemHostUnregister",
        "cuMemRelease",
        "cuMemUnmap",
        "cuStreamDestroy",
        "host waits for the device",
        "host waits for the device",
    ]
    assert fake.device.pinned_bytes == 0


# -- evict and restore -----------------------------------------------------------------------------


@pytest.fixture
def mirrored(fake: SimpleNamespace) -> Any:
    slab = DeviceSlab(fake.device, 4 * CHUNK, populate=True)
    mirror = Mirror(slab, 3 * CHUNK)
    fake.log.clear()
    yield SimpleNamespace(slab=slab, mirror=mirror, host=mirror.host.address, log=fake.log, module=fake.module)
    mirror.close()
    slab.close()


def test_evict_and_restore(mirrored: Any) -> None:
    log, host, mirror = mirrored.log, mirrored.host, mirrored.mirror
    mirror.evict(CHUNK + 1, save=True)
    assert log == [
        "event 1 on stream 0",
        "stream 5000 waits for event 1",
        f"cuMemcpyDtoHAsync({host}, {BASE}, {2 * CHUNK}, 5000)",
        "event 2 on stream 5000",
        "host waits for event 2",
        f"cuMemUnmap({BASE}, {CHUNK})",
        "cuMemRelease(1)",
        f"cuMemUnmap({BASE + CHUNK}, {CHUNK})",
        "cuMemRelease(2)",
    ]
    log.clear()
    mirror.restore()
    assert log == [
        f"cuMemCreate({CHUNK}, prop, 0)",
        f"cuMemMap({BASE}, {CHUNK}, 0, 5, 0)",
        f"cuMemSetAccess({BASE}, {CHUNK}, [CUmemAccessDesc], 1)",
        f"cuMemCreate({CHUNK}, prop, 0)",
        f"cuMemMap({BASE + CHUNK}, {CHUNK}, 0, 6, 0)",
        f"cuMemSetAccess({BASE + CHUNK}, {CHUNK}, [CUmemAccessDesc], 1)",
        f"cuMemcpyHtoDAsync({BASE}, {host}, {2 * CHUNK}, 5000)",
        "event 3 on stream 5000",
        "stream 0 waits for event 3",
    ]
    log.clear()
    mirror.evict(CHUNK, save=False)
    assert log == [
        "event 4 on stream 0",
        "host waits for event 4",
        f"cuMemUnmap({BASE}, {CHUNK})",
        "cuMemRelease(5)",
    ]


def test_steps_overlap_copies_with_giving_back(mirrored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.arena.device.mirror._STEP", CHUNK)
    log, host, mirror = mirrored.log, mirrored.host, mirrored.mirror
    mirror.evict(2 * CHUNK, save=True)
    assert log[2:] == [
        f"cuMemcpyDtoHAsync({host}, {BASE}, {CHUNK}, 5000)",
        "event 2 on stream 5000",
        f"cuMemcpyDtoHAsync({host + CHUNK}, {BASE + CHUNK}, {CHUNK}, 5000)",
        "event 3 on stream 5000",
        "host waits for event 2",
        f"cuMemUnmap({BASE}, {CHUNK})",
        "cuMemRelease(1)",
        "host waits for event 3",
        f"cuMemUnmap({BASE + CHUNK}, {CHUNK})",
        "cuMemRelease(2)",
    ]
    log.clear()
    mirror.restore()
    copies = [line for line in log if "cuMemcpy" in line]
    assert copies == [
        f"cuMemcpyHtoDAsync({BASE + CHUNK}, {host + CHUNK}, {CHUNK}, 5000)",
        f"cuMemcpyHtoDAsync({BASE}, {host}, {CHUNK}, 5000)",
    ]


def test_a_restore_that_runs_out_of_memory_in_the_middle(mirrored: Any) -> None:
    mirror, module = mirrored.mirror, mirrored.module
    mirror.evict(save=True)
    made = module._calls["cuMemCreate"]
    # All three at once: the second is refused, and the first is given back. Then one by one: again the second.
    module.failing |= {("cuMemCreate", made + 2): 2, ("cuMemCreate", made + 4): 2}
    mirrored.log.clear()
    with pytest.raises(DeviceMemoryError, match=r"4\.00 MiB of 6\.00 MiB are still to come back"):
        mirror.restore()
    assert (mirror.out_bytes, mirrored.slab.mapped_bytes) == (2 * CHUNK, 2 * CHUNK)
    assert [line for line in mirrored.log if "cuMemcpy" in line] == [
        f"cuMemcpyHtoDAsync({BASE + 2 * CHUNK}, {mirrored.host + 2 * CHUNK}, {CHUNK}, 5000)"
    ]
    assert mirrored.log[-2:] == ["event 3 on stream 5000", "stream 0 waits for event 3"]
    mirror.restore()
    assert (mirror.out_bytes, module.used) == (0, 4 * CHUNK)


@pytest.mark.parametrize("failing", ["cuMemcpyDtoHAsync", "cuMemUnmap"])
def test_an_evict_that_fails_says_how_far_it_came(mirrored: Any, failing: str) -> None:
    mirror = mirrored.mirror
    mirrored.module.failing[failing, 1] = 1
    with pytest.raises(DeviceError):
        mirror.evict(CHUNK, save=True)
    assert mirror.out_bytes == 0


def test_what_was_saved_is_no_longer_once_it_is_being_saved_again(mirrored: Any) -> None:
    mirrored.mirror.save()
    mirrored.module.failing["cuMemcpyDtoHAsync", 2] = 1
    with pytest.raises(DeviceError):
        mirrored.mirror.evict(save=True)
    with pytest.raises(UsageError, match="never saved"):
        mirrored.mirror.evict(save=False)


# -- which device ----------------------------------------------------------------------------------


def test_one_object_per_device(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.arena.device.find._opened", {0: fake.device})
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(open_device("cuda"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for spec in ("cuda:0", torch.device("cuda"), torch.device("cuda", 0), fake.device):
        found.append(open_device(spec))
    assert all(each is fake.device for each in found)
    with pytest.raises(NoDeviceError, match="cuda:3"):
        open_device("cuda:3")
