"""Memory that a task lends to others: out, back, wholly and in part, with digests, and when others have taken it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.mirror import Mirror
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.errors import DeviceMemoryError, DigestError, PinnedMemoryError, UsageError


class Lent:
    """A slab of eight chunks, filled, and a mirror of some of its bytes."""

    def __init__(self, device: Any, kit: Any, chunks: float = 8) -> None:
        self.device, self.kit = device, kit
        self.chunk = device.granularity
        self.slab = DeviceSlab(device, 8 * self.chunk, populate=True)
        self.values = kit.pattern(8 * self.chunk, 5)
        kit.put(self.slab, 0, self.values)
        self.whole = self.slab.tensor(0, torch.uint8, (8 * self.chunk,))
        self.mirror = Mirror(self.slab, int(chunks * self.chunk))
        self.mirror.evict(save=True)  # and whatever the driver keeps for itself after the first time is taken
        self.mirror.restore().wait()

    def right(self, low: int = 0) -> bool:
        """Whether a kernel sees the right bytes from chunk ``low`` on."""
        self.device.kernel_reads(self.slab.address + low * self.chunk, (8 - low) * self.chunk)
        return torch.equal(self.whole[low * self.chunk :].cpu(), self.values[low * self.chunk :])

    def close(self) -> None:
        self.mirror.close()
        self.slab.close()


@pytest.fixture
def lent(device: Any, kit: Any) -> Any:
    made = Lent(device, kit)
    yield made
    made.close()


def free(device: Any) -> int:
    return device.memory()[0]


def test_out_and_back_as_a_whole(lent: Lent) -> None:
    before, address = free(lent.device), lent.slab.address
    for save in (True, False, False):
        event = lent.mirror.evict(save=save)
        assert event.done()
        assert (lent.mirror.out_bytes, lent.slab.mapped_bytes) == (8 * lent.chunk, 0)
        assert free(lent.device) - before == 8 * lent.chunk
        lent.mirror.restore().wait()
        assert (lent.mirror.out_bytes, free(lent.device)) == (0, before)
        assert (lent.slab.address, lent.whole.data_ptr()) == (address, address)
        assert lent.right()
    lent.mirror.verify()


def test_out_and_back_by_steps(lent: Lent) -> None:
    mirror, chunk, before = lent.mirror, lent.chunk, free(lent.device)
    for nbytes, out in ((1, 1), (chunk, 2), (chunk + 1, 4), (0, 4)):
        mirror.evict(nbytes, save=True)
        assert mirror.out_bytes == out * chunk
        assert free(lent.device) - before == out * chunk
        assert lent.right(out)  # the rest is in use all the while
    assert mirror.evictable_bytes == 4 * chunk
    for nbytes, out in ((1, 3), (chunk + 1, 1), (0, 1)):
        mirror.restore(nbytes)
        assert mirror.out_bytes == out * chunk
        assert free(lent.device) - before == out * chunk
        assert lent.right(out)
    mirror.verify()
    mirror.restore(100 * chunk)
    assert mirror.out_bytes == 0
    assert lent.right()
    mirror.restore()
    mirror.verify()


def test_kernels_given_before_and_after_need_no_host(lent: Lent) -> None:
    for _ in range(3):
        lent.device.kernel_reads(lent.slab.address, 8 * lent.chunk)
        total = lent.whole.sum(dtype=torch.int64)
        lent.mirror.evict(3 * lent.chunk, save=False)
        lent.mirror.restore()
        lent.device.kernel_reads(lent.slab.address, 8 * lent.chunk)
        again = lent.whole.sum(dtype=torch.int64)
        assert total.item() == again.item() == lent.values.sum(dtype=torch.int64).item()


def test_bytes_that_changed_are_saved_again(lent: Lent) -> None:
    lent.values = lent.kit.pattern(8 * lent.chunk, 6)
    lent.kit.put(lent.slab, 0, lent.values)
    with pytest.raises(DigestError, match="on the device"):
        lent.mirror.verify()
    lent.mirror.evict(save=True)
    lent.mirror.restore()
    assert lent.right()
    lent.mirror.verify()


def test_saved_once_it_goes_without_a_copy(device: Any, kit: Any) -> None:
    lent = Lent(device, kit)
    lent.mirror.save().wait()
    lent.mirror.verify()
    out = getattr(device, "copied_out", None)
    lent.mirror.evict(save=False)
    assert getattr(device, "copied_out", None) == out
    lent.mirror.restore()
    assert lent.right()
    lent.close()


def test_bytes_written_to_the_mirror_by_their_reader_are_adopted(device: Any, kit: Any) -> None:
    slab = DeviceSlab(device, 2 * device.granularity, populate=True)
    mirror = Mirror(slab, slab.nbytes)
    values = kit.pattern(slab.nbytes, 7)
    device.host_writes(mirror.host.address, slab.nbytes)
    mirror.host.tensor(0, torch.uint8, (slab.nbytes,)).copy_(values)
    kit.put(slab, 0, values)
    with pytest.raises(UsageError, match="never saved"):
        mirror.evict(save=False)
    assert mirror.out_bytes == 0
    mirror.adopt()
    mirror.verify()
    mirror.evict(save=False)
    mirror.restore().wait()
    assert torch.equal(kit.get(slab, 0, slab.nbytes), values)
    mirror.close()
    slab.close()


@pytest.mark.parametrize(("chunks", "can_go"), [(0.001, 0), (1, 1), (1.5, 1), (7.999, 7), (8, 8), (100, 8)])
def test_odd_sizes_leave_alone_what_is_not_mirrored(device: Any, kit: Any, chunks: float, can_go: int) -> None:
    lent = Lent(device, kit, chunks)
    assert lent.mirror.nbytes == min(int(chunks * lent.chunk), 8 * lent.chunk)
    assert lent.mirror.evictable_bytes == can_go * lent.chunk
    assert lent.mirror.host.nbytes - lent.mirror.nbytes < 4096
    lent.mirror.evict(save=True)
    assert lent.slab.mapped_bytes == (8 - can_go) * lent.chunk
    assert lent.right(can_go)
    lent.mirror.restore()
    assert lent.right()
    lent.mirror.verify()
    lent.close()


def test_the_last_chunk_goes_if_nothing_after_the_mirrored_bytes_is_held(device: Any, kit: Any) -> None:
    grain = device.granularity
    slab = DeviceSlab(device, 3 * grain, populate=False)
    nbytes = grain + grain // 2 + 3
    slab.hold([(0, nbytes)])
    values = kit.pattern(nbytes, 8)
    kit.put(slab, 0, values)
    mirror = Mirror(slab, nbytes)
    before = free(device)
    mirror.evict(save=True)
    assert (mirror.out_bytes, slab.mapped_bytes) == (2 * grain, 0)
    assert free(device) - before == 2 * grain
    mirror.restore().wait()
    assert (slab.held, free(device)) == ([(0, nbytes)], before)
    assert torch.equal(kit.get(slab, 0, nbytes), values)
    slab.hold([(nbytes, 1)])
    mirror.evict(save=True)
    assert (mirror.out_bytes, slab.mapped_bytes) == (grain, grain)
    mirror.close()
    slab.close()


def test_steps_smaller_than_the_whole(device: Any, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.arena.device.mirror._STEP", 3 * device.granularity)
    lent = Lent(device, kit)
    lent.mirror.evict(save=True)
    lent.mirror.restore(5 * lent.chunk)
    assert lent.right(3)
    lent.mirror.restore()
    assert lent.right()
    lent.close()


# -- others have the memory ------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize("left", range(9))
def test_what_there_is_memory_for_comes_back_and_the_rest_later(
    kit: Any, left: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = EmulatedDevice(16 << 16, jitter=left)
    monkeypatch.setattr("narrowboat.arena.device.mirror._STEP", step * device.granularity)
    lent = Lent(device, kit)
    lent.mirror.evict(save=True)
    others = free(device) - left * lent.chunk
    device.take(others)
    if left < 8:
        with pytest.raises(DeviceMemoryError, match=f"^{(8 - left) * 64}(\\.0+)? KiB of 512(\\.0+)? KiB are still"):
            lent.mirror.restore()
    else:
        lent.mirror.restore()
    assert (lent.mirror.out_bytes, free(device)) == ((8 - left) * lent.chunk, 0)
    assert lent.right(8 - left)
    lent.mirror.verify()
    device.take(-others)
    lent.mirror.restore()
    assert lent.right()
    lent.mirror.verify()
    lent.close()


def test_two_tasks_share_memory_for_one(kit: Any) -> None:
    device = EmulatedDevice(12 << 16, jitter=1)  # twelve chunks for two slabs of eight
    one = Lent(device, kit)
    one.mirror.evict(4 * one.chunk, save=False)
    two = Lent(device, kit)
    assert free(device) == 0
    with pytest.raises(DeviceMemoryError):
        one.mirror.restore()
    for _ in range(3):
        two.mirror.evict(4 * two.chunk, save=False)
        one.mirror.restore()
        assert one.right()
        one.mirror.evict(4 * one.chunk, save=False)
        two.mirror.restore()
        assert two.right()
    one.close()
    two.close()


def test_a_swap_thread_works_for_the_thread_that_computes(device: Any, kit: Any) -> None:
    lent = Lent(device, kit)
    mark = []

    def job(known: object, work: Any) -> None:
        def run() -> None:
            device.take_over(known)
            mark.append(work())
            mark.append(device.hand_over())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    for _ in range(3):
        assert lent.right()
        given = device.compute().record()
        job(device.hand_over(), lambda given=given: lent.mirror.evict(save=False, after=given))
        job(device.hand_over(), lent.mirror.restore)
        device.take_over(mark[-1])
        device.compute().wait(mark[-2])
    assert lent.right()
    lent.close()


# -- digests ---------------------------------------------------------------------------------------


def test_a_changed_byte_is_found_and_named(lent: Lent) -> None:
    at = 5 * lent.chunk + 77
    flipped = lent.values[at : at + 1] ^ 1
    lent.kit.put(lent.slab, at, flipped)
    with pytest.raises(
        DigestError, match=rf"chunk 5 .*\(bytes {5 * lent.chunk} to {6 * lent.chunk}\).* on the device"
    ):
        lent.mirror.verify()
    lent.mirror.evict(save=False)  # as the message says
    lent.mirror.restore()
    assert lent.right()
    lent.mirror.verify()


def test_a_changed_byte_in_host_memory_is_found_wherever_the_chunk_is(lent: Lent) -> None:
    lent.mirror.evict(2 * lent.chunk, save=False)
    place = lent.mirror.host.bytes_at(lent.chunk + 5, 1)
    place[0] ^= 1
    with pytest.raises(DigestError, match=r"chunk 1 .*host memory"):
        lent.mirror.verify()
    place[0] ^= 1
    lent.mirror.verify()
    lent.mirror.restore()
    place[0] ^= 1
    with pytest.raises(DigestError, match=r"chunk 1 .*host memory"):
        lent.mirror.verify()


def test_verifying_leaves_the_mirror_as_it_was(lent: Lent) -> None:
    lent.kit.put(lent.slab, 0, lent.values[:1] ^ 1)
    with pytest.raises(DigestError):
        lent.mirror.verify()
    assert bytes(lent.mirror.host.bytes_at(0, 1)) == lent.values[:1].numpy().tobytes()


# -- what is refused -------------------------------------------------------------------------------


def test_more_than_can_go_is_refused(lent: Lent) -> None:
    lent.mirror.evict(2 * lent.chunk, save=True)
    with pytest.raises(UsageError, match=r"can go, and .* were asked for"):
        lent.mirror.evict(6 * lent.chunk + 1, save=True)
    assert lent.mirror.out_bytes == 2 * lent.chunk


def test_what_is_not_held_cannot_be_evicted(device: Any) -> None:
    slab = DeviceSlab(device, 4 * device.granularity, populate=False)
    slab.hold([(0, device.granularity), (2 * device.granularity, device.granularity)])
    mirror = Mirror(slab, slab.nbytes)
    mirror.evict(1, save=True)
    with pytest.raises(UsageError, match="does not hold"):
        mirror.evict(1, save=True)
    assert mirror.out_bytes == device.granularity
    mirror.restore()
    mirror.close()
    slab.close()


def test_no_more_is_pinned_than_was_said() -> None:
    device = EmulatedDevice(pinnable=1 << 18)
    slab = DeviceSlab(device, 1 << 20, populate=True)
    mirror = Mirror(slab, 1 << 18)
    assert device.pinned_bytes == 1 << 18
    mirror.evict(save=True)
    mirror.restore()
    mirror.verify()  # with no pinned memory beside it
    with pytest.raises(PinnedMemoryError):
        Mirror(slab, 1)
    mirror.close()
    assert device.pinned_bytes == 0
    with pytest.raises(UsageError, match="at least one byte"):
        Mirror(slab, 0)


def test_a_closed_mirror_refuses_everything(lent: Lent) -> None:
    lent.mirror.close()
    lent.mirror.close()
    for use in (lambda: lent.mirror.evict(save=True), lent.mirror.restore, lent.mirror.verify, lent.mirror.save):
        with pytest.raises(UsageError, match="closed"):
            use()
