"""Long random lives of a device's slab and its mirror, against models that are sets of bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.mirror import Mirror
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.errors import DeviceMemoryError, UsageError

GRAIN = 4096
CHUNKS = 6
SIZE = CHUNKS * GRAIN
UNIT = 256  # of the model; offsets are not all multiples of it, so that it is rounded as bytes would be

EDGE = st.integers(0, SIZE)
RANGES = st.lists(st.tuples(EDGE, EDGE).map(lambda ends: (min(ends), abs(ends[0] - ends[1]))), max_size=3)


def bytes_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {at for offset, nbytes in ranges for at in range(offset, offset + nbytes)}


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["hold", "release", "after", "take"]), RANGES), max_size=12),
    room=st.integers(1, CHUNKS + 1),
)
def test_a_slab_holds_what_a_set_of_bytes_says(steps: list[tuple[str, Any]], room: int) -> None:
    device = EmulatedDevice(room * GRAIN, granularity=GRAIN)
    slab = DeviceSlab(device, SIZE, populate=False)
    whole = slab.tensor(0, torch.uint8, (SIZE,))
    held: set[int] = set()
    written: dict[int, int] = {}  # by chunk: what a kernel wrote there while it was mapped
    for number, (step, ranges) in enumerate(steps):
        wanted = held | bytes_of(ranges) if step in ("hold", "take") else held - bytes_of(ranges)
        chunks = {at // GRAIN for at in wanted}
        try:
            if step in ("hold", "take"):
                slab.hold(ranges)
            else:
                slab.release(ranges, after=device.compute().record() if step == "after" else None)
        except DeviceMemoryError:
            assert len(chunks) > room
        else:
            assert len(chunks) <= room
            held = wanted
            written = {chunk: value for chunk, value in written.items() if chunk in chunks}
            for chunk in chunks - written.keys():
                assert (whole[chunk * GRAIN : (chunk + 1) * GRAIN] == 0xFF).all()  # memory that is fresh
                device.kernel_reads(slab.address + chunk * GRAIN, GRAIN)
                whole[chunk * GRAIN : (chunk + 1) * GRAIN] = written[chunk] = (number * CHUNKS + chunk) % 255
        assert bytes_of(slab.held) == held
        assert sum(nbytes for _, nbytes in slab.held) == len(held)  # disjoint
        assert slab.held == sorted(slab.held)
        assert slab.mapped_bytes == len(written) * GRAIN == slab.would_map(slab.held)
        assert device.memory()[0] == (room - len(written)) * GRAIN
        for chunk, value in written.items():
            assert (whole[chunk * GRAIN : (chunk + 1) * GRAIN] == value).all()
    slab.close()
    assert device.memory()[0] == room * GRAIN


STEP = st.one_of(
    st.tuples(st.just("evict"), st.integers(0, SIZE), st.booleans()),
    st.tuples(st.just("restore"), st.one_of(st.none(), st.integers(0, SIZE))),
    st.tuples(st.just("kernel reads")),
    st.tuples(st.just("kernel writes"), st.integers(0, CHUNKS - 1)),
    st.tuples(st.just("others take"), st.integers(0, CHUNKS)),
    st.tuples(st.just("verify")),
    st.tuples(st.just("save")),
)


@pytest.mark.parametrize("pieces", [1, 2, 100])
@settings(max_examples=100, deadline=None)
@given(steps=st.lists(STEP, max_size=14), nbytes=st.integers(1, SIZE), jitter=st.integers(0, 3))
def test_a_mirror_never_loses_a_byte_nor_uses_one_too_early(
    pieces: int, steps: list[tuple[Any, ...]], nbytes: int, jitter: int
) -> None:
    device = EmulatedDevice(CHUNKS * GRAIN, granularity=GRAIN, jitter=jitter)
    slab = DeviceSlab(device, SIZE)
    whole = slab.tensor(0, torch.uint8, (SIZE,))
    lane = device.compute()

    def kernel_writes(chunk: int, value: int) -> None:
        lane.submit()
        device.order.write(lane.name, slab.address + chunk * GRAIN, GRAIN, "a kernel")
        whole[chunk * GRAIN : (chunk + 1) * GRAIN] = value

    bytes_now = list(range(1, CHUNKS + 1))
    for chunk, value in enumerate(bytes_now):
        kernel_writes(chunk, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("narrowboat.arena.device.mirror._STEP", pieces * GRAIN)
        mirror = Mirror(slab, nbytes)
        limit, out, taken = nbytes // GRAIN, 0, 0
        saved: dict[int, int] = {}
        for number, (step, *arguments) in enumerate(steps):
            if step == "evict":
                most, save = arguments
                upto = out + -(-most // GRAIN)
                stale = not save and any(saved.get(c) is None for c in range(out, min(upto, limit)))
                if not save and not stale and any(saved[c] != bytes_now[c] for c in range(out, min(upto, limit))):
                    continue  # the caller knows better than to lose what changed
                if upto > limit or stale:
                    with pytest.raises(UsageError):
                        mirror.evict(most, save=save)
                    continue
                mirror.evict(most, save=save)
                if save:
                    saved |= {chunk: bytes_now[chunk] for chunk in range(out, upto)}
                out = upto
            elif step == "restore":
                low = 0 if arguments[0] is None else max(out - -(-arguments[0] // GRAIN), 0)
                room = out - taken
                if out - low > room:
                    with pytest.raises(DeviceMemoryError):
                        mirror.restore(arguments[0])
                    out -= room
                else:
                    mirror.restore(arguments[0])
                    out = low
            elif step == "kernel reads":
                device.kernel_reads(slab.address + out * GRAIN, (CHUNKS - out) * GRAIN)
                got = whole.view(CHUNKS, GRAIN)[out:]
                assert torch.equal(got, torch.tensor(bytes_now[out:], dtype=torch.uint8)[:, None].expand_as(got))
            elif step == "kernel writes" and arguments[0] >= out:
                bytes_now[arguments[0]] = (number * 7 + 20) % 255
                kernel_writes(arguments[0], bytes_now[arguments[0]])
            elif step == "others take":
                device.take(min(arguments[0], out) * GRAIN - taken * GRAIN)
                taken = min(arguments[0], out)
            elif step == "save":
                mirror.save()
                saved |= {chunk: bytes_now[chunk] for chunk in range(out, limit)}
            elif step == "verify" and all(bytes_now[c] == value for c, value in saved.items() if c >= out):
                mirror.verify()
            assert mirror.out_bytes == out * GRAIN
            assert device.memory()[0] == (out - taken) * GRAIN
        device.take(-taken * GRAIN)
        mirror.restore()
        device.kernel_reads(slab.address, SIZE)
        got = whole.view(CHUNKS, GRAIN)
        assert torch.equal(got, torch.tensor(bytes_now, dtype=torch.uint8)[:, None].expand_as(got))
        mirror.close()
        slab.close()
