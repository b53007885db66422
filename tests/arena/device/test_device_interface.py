"""What every device does alike: the emulated one, and a GPU where there is one."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.slab import DeviceSlab, InPlaceSlab
from narrowboat.arena.slab import Slab
from narrowboat.errors import DeviceMemoryError, DeviceOrderError, NoDeviceError, PinnedMemoryError, UsageError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


def free(device: Any) -> int:
    return device.memory()[0]


def warm(slab: DeviceSlab) -> None:
    """Whatever a driver keeps for itself once memory has been mapped somewhere is taken."""
    slab.hold([(0, slab.nbytes)])
    slab.release([(0, slab.nbytes)])


# -- memory behind addresses -----------------------------------------------------------------------


def test_free_memory_changes_by_exactly_the_chunks(device: Any) -> None:
    slab = DeviceSlab(device, 8 * device.granularity, populate=False)
    warm(slab)
    before = free(device)
    slab.hold([(0, 1), (3 * slab.chunk - 1, 2)])
    assert slab.mapped_bytes == 3 * slab.chunk
    assert before - free(device) == 3 * slab.chunk
    slab.release([(0, 2 * slab.chunk)])
    assert before - free(device) == 2 * slab.chunk
    slab.release([(0, slab.nbytes)])
    assert free(device) == before
    slab.close()
    assert free(device) == before


def test_addresses_stay_while_memory_comes_and_goes(device: Any, kit: Any) -> None:
    grain = device.granularity
    slab = DeviceSlab(device, 3 * grain, populate=True)
    whole = slab.tensor(0, torch.uint8, (3 * grain,))
    address, pointer = slab.address, whole.data_ptr()
    for seed in range(3):
        values = kit.pattern(3 * grain, seed)
        kit.put(slab, 0, values)
        assert torch.equal(whole.cpu(), values)
        assert torch.equal(kit.get(slab, 0, 3 * grain), values)
        slab.release([(grain, grain)])
        slab.hold([(grain, grain)])
        assert (slab.address, whole.data_ptr()) == (address, pointer)
        assert torch.equal(whole[:grain].cpu(), values[:grain])  # what stayed is as it was
        assert torch.equal(whole[2 * grain :].cpu(), values[2 * grain :])
    slab.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_kind_see_new_bytes_after_a_remap(device: Any, kit: Any, dtype: torch.dtype) -> None:
    slab = DeviceSlab(device, device.granularity, populate=True)
    offset = 4096
    made = slab.tensor(offset, dtype, (3, 5))
    assert (made.shape, made.dtype, made.device) == ((3, 5), dtype, device.torch_device)
    assert made.is_contiguous() and not made.requires_grad and not made.is_inference()
    assert made.data_ptr() == slab.address + offset
    for seed in range(2):
        values = (kit.pattern(15 * dtype.itemsize, seed) % 2).view(dtype).view(3, 5)
        kit.put(slab, offset, values.contiguous().view(-1).view(torch.uint8))
        assert torch.equal(made.cpu(), values)
        slab.release([(0, slab.nbytes)])
        slab.hold([(0, slab.nbytes)])
    slab.close()


def test_tensors_can_be_made_before_there_is_memory(device: Any, kit: Any) -> None:
    slab = DeviceSlab(device, 2 * device.granularity, populate=False)
    made = slab.tensor(device.granularity - 8, torch.float32, (4,))
    empty = slab.tensor(0, torch.float32, (0, 3))
    assert (empty.shape, empty.device) == ((0, 3), device.torch_device)
    slab.hold([(0, slab.nbytes)])
    kit.put(slab, device.granularity - 8, torch.tensor([1.0, 2.0, 3.0, 4.0]).view(torch.uint8))
    assert made.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert (made + 1).sum().item() == 14.0
    slab.close()


def test_tensors_are_ordinary_ones_in_inference_mode_too(device: Any) -> None:
    slab = DeviceSlab(device, device.granularity, populate=True)
    with torch.inference_mode():
        made = slab.tensor(0, torch.float32, (4,))
    assert not made.is_inference()
    del made
    slab.close()


def test_a_tensor_keeps_its_owner(device: Any) -> None:
    class Owner:
        pass

    address = device.reserve(device.granularity)
    handle = device.map(address, device.granularity)
    owner, gone = Owner(), threading.Event()
    weakref.finalize(owner, gone.set)
    made = device.tensor(address, torch.uint8, (16,), owner)
    view = made[3:]
    del owner, made
    gc.collect()
    assert not gone.is_set()
    del view
    gc.collect()
    assert gone.is_set()
    device.synchronize()
    device.unmap(address, device.granularity, handle)
    device.unreserve(address, device.granularity)


@pytest.mark.parametrize("chunk", [None, 1, "grain", "more", "odd"])
def test_chunks_are_multiples_of_the_granularity(device: Any, chunk: Any) -> None:
    grain = device.granularity
    wanted = {"grain": grain, "more": 4 * grain, "odd": 2 * grain + 1}.get(chunk, chunk)
    slab = DeviceSlab(device, 5 * grain + 1, chunk=wanted, populate=False)
    assert slab.chunk == {None: grain, 1: grain, "grain": grain, "more": 4 * grain, "odd": 3 * grain}[chunk]
    assert slab.nbytes % slab.chunk == 0 and slab.nbytes - slab.chunk < 5 * grain + 1 <= slab.nbytes
    assert slab.would_map([(0, 1)]) == slab.chunk
    slab.hold([(slab.nbytes - 1, 1)])
    assert slab.mapped_bytes == slab.chunk
    assert slab.held == [(slab.nbytes - 1, 1)]
    slab.close()


def test_too_little_memory_changes_nothing(device: Any, kit: Any) -> None:
    chunk = max(device.memory()[1] // 64 // device.granularity, 1) * device.granularity
    slab = DeviceSlab(device, 130 * chunk, chunk=chunk, populate=False)
    slab.hold([(0, 100)])
    values = kit.pattern(100, 1)
    kit.put(slab, 0, values)
    before = free(device)
    with pytest.raises(DeviceMemoryError, match="are free"):
        slab.hold([(0, slab.nbytes)])
    assert (free(device), slab.mapped_bytes, slab.held) == (before, chunk, [(0, 100)])
    assert torch.equal(kit.get(slab, 0, 100), values)
    slab.close()
    with pytest.raises(DeviceMemoryError):
        DeviceSlab(device, 130 * chunk, chunk=chunk, populate=True)
    assert free(device) >= before


def test_memory_can_be_given_back_after_a_mark_alone(device: Any) -> None:
    slab = DeviceSlab(device, 2 * device.granularity, populate=True)
    whole = slab.tensor(0, torch.uint8, (slab.nbytes,))
    device.kernel_reads(slab.address, slab.nbytes)
    _ = whole.sum()
    slab.release([(0, slab.chunk)], after=device.compute().record())
    assert slab.mapped_bytes == slab.chunk
    slab.close()


# -- streams, events, copies -----------------------------------------------------------------------


def test_copies_are_ordered_by_events(device: Any, kit: Any) -> None:
    nbytes = 8 * device.granularity
    slab, host, back = DeviceSlab(device, nbytes, populate=True), Slab(nbytes), Slab(nbytes)
    device.pin(host)
    device.pin(back)
    whole = slab.tensor(0, torch.uint8, (nbytes,))
    copies, returns = device.stream("in"), device.stream("out")
    free_again = device.compute().record()
    for seed in range(5):
        values = kit.pattern(nbytes, seed)
        copied = copies.record()
        copied.wait()
        device.host_writes(host.address, nbytes)
        host.tensor(0, torch.uint8, (nbytes,)).copy_(values)
        copies.wait(free_again)
        device.copy_in(slab.address, host.address, nbytes, copies)
        ready = copies.record()
        device.compute().wait(ready)
        device.kernel_reads(slab.address, nbytes)
        total = whole.sum(dtype=torch.int64)
        returns.wait(ready)
        device.copy_out(back.address, slab.address, nbytes, returns)
        out = returns.record()
        out.wait()
        assert torch.equal(back.tensor(0, torch.uint8, (nbytes,)), values)
        assert total.item() == values.sum(dtype=torch.int64).item()
        device.compute().wait(out)
        free_again = device.compute().record()
    device.synchronize()
    for each in (host, back):
        device.unpin(each)
        each.close()
    slab.close()


def test_events_tell_time_and_whether_they_have_passed(device: Any) -> None:
    nbytes = 4 * device.granularity
    slab, host = DeviceSlab(device, nbytes, populate=True), Slab(nbytes)
    device.pin(host)
    copies = device.stream("in")
    begin = copies.record(timed=True)
    device.copy_in(slab.address, host.address, nbytes, copies)
    end = copies.record(timed=True)
    end.wait()
    assert begin.done() and end.done()
    assert 0 <= end.seconds_since(begin) < 60
    copies.synchronize()
    device.unpin(host)
    slab.close()


def test_copies_within_the_device_come_after_kernels_given(device: Any, kit: Any) -> None:
    grain = device.granularity
    slab = DeviceSlab(device, 2 * grain, populate=True)
    values = kit.pattern(grain, 3)
    kit.put(slab, 0, values)
    slab.copy(0, grain + 100, 1000)
    assert torch.equal(kit.get(slab, grain + 100, 1000), values[:1000])
    slab.close()


def test_streams_are_what_they_are(device: Any) -> None:
    assert device.compute() == device.compute()
    assert device.stream("one") != device.stream("two")
    assert device.compute() != device.stream("one")


def test_what_one_thread_did_another_can_build_on(device: Any, kit: Any) -> None:
    nbytes = device.granularity
    slab, host = DeviceSlab(device, nbytes, populate=True), Slab(nbytes)
    device.pin(host)
    copies, known, events = device.stream("in"), [device.hand_over()], []
    values = kit.pattern(nbytes, 4)

    def bring() -> None:
        device.take_over(known[0])
        device.host_writes(host.address, nbytes)
        host.tensor(0, torch.uint8, (nbytes,)).copy_(values)
        device.copy_in(slab.address, host.address, nbytes, copies)
        events.append(copies.record())
        known.append(device.hand_over())

    thread = threading.Thread(target=bring)
    thread.start()
    thread.join()
    device.take_over(known[1])
    device.compute().wait(events[0])
    device.kernel_reads(slab.address, nbytes)
    assert torch.equal(slab.tensor(0, torch.uint8, (nbytes,)).cpu(), values)
    device.synchronize()
    device.unpin(host)
    slab.close()


def test_two_threads_may_pin_the_same_addresses_one_after_the_other(device: Any) -> None:
    host = Slab(1 << 16)
    device.pin(host)
    device.unpin(host)
    failed: list[BaseException] = []

    def again() -> None:
        try:
            device.pin(host)
            device.unpin(host)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    assert failed == []


# -- one memory ------------------------------------------------------------------------------------


def test_host_memory_is_used_in_place(unified: Any, kit: Any) -> None:
    assert unified.unified
    slab = InPlaceSlab(unified, 100_000)
    made = slab.tensor(4096, torch.uint8, (5000,))
    assert made.device == unified.torch_device
    for seed in range(2):
        values = kit.pattern(5000, seed)
        unified.host_writes(slab.address + 4096, 5000)
        slab.bytes_at(4096, 5000)[:] = values.numpy().tobytes()
        unified.kernel_reads(slab.address + 4096, 5000)
        assert torch.equal(made.cpu(), values)
        unified.synchronize()
    del made
    slab.close()
    slab.close()


def test_what_nobody_holds_any_more_is_given_back(device: Any) -> None:
    before = free(device)
    slab = DeviceSlab(device, device.granularity, populate=True)
    made = slab.tensor(0, torch.uint8, (100,))
    del slab
    gc.collect()
    assert before - free(device) == device.granularity  # the tensor needs it
    del made
    gc.collect()
    assert free(device) == before


def test_pinned_memory_that_nobody_holds_any_more_is_unpinned(unified: Any) -> None:
    slab = InPlaceSlab(unified, 100_000)
    made = slab.tensor(0, torch.uint8, (100,))
    del slab
    gc.collect()
    assert unified.pinned_bytes >= 100_000
    del made
    gc.collect()
    assert unified.pinned_bytes == 0


# -- what goes wrong -------------------------------------------------------------------------------


def test_more_than_may_be_pinned_is_refused() -> None:
    device = EmulatedDevice(pinnable=1 << 16)
    one = Slab(1 << 15)
    device.pin(one)
    with pytest.raises(PinnedMemoryError, match="cpu"):
        device.pin(Slab((1 << 15) + 1))
    assert device.pinned_bytes == 1 << 15
    device.unpin(one)
    assert device.pinned_bytes == 0


def test_a_copy_of_memory_that_is_not_pinned_is_refused() -> None:
    device = EmulatedDevice()
    slab, host = DeviceSlab(device, 1 << 16, populate=True), Slab(1 << 16)
    with pytest.raises(DeviceOrderError, match="not pinned"):
        device.copy_in(slab.address, host.address, 100, device.stream("in"))


def test_use_before_the_copy_and_unmapping_during_it_are_refused() -> None:
    device = EmulatedDevice()
    slab, host = DeviceSlab(device, 1 << 16, populate=True), Slab(1 << 16)
    device.pin(host)
    copies = device.stream("in")
    device.copy_in(slab.address, host.address, 1 << 16, copies)
    with pytest.raises(DeviceOrderError, match="used before ready"):
        device.kernel_reads(slab.address + 100, 1)
    with pytest.raises(DeviceOrderError, match="overwritten while in use"):
        device.host_writes(host.address, 1)
    with pytest.raises(DeviceOrderError, match="unmapped while in use"):
        slab.release([(0, 1 << 16)], after=device.compute().record())
    slab.release([(0, 1 << 16)])
    with pytest.raises(DeviceOrderError, match="no memory"):
        device.kernel_reads(slab.address, 1)


@pytest.mark.parametrize("spec", ["cpu", "meta", "nonsense", "cuda:x", 5, None])
def test_what_is_no_device_is_refused(spec: Any) -> None:
    with pytest.raises(UsageError, match="device"):
        open_device(spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("spec", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_without_a_gpu_the_reason_is_told(spec: Any) -> None:
    with pytest.raises(NoDeviceError, match="cannot be used: torch"):
        open_device(spec)


def test_an_object_that_is_a_device_is_taken_as_it_is() -> None:
    device = EmulatedDevice()
    assert open_device(device) is device
