"""Streaming to a device with memory of its own, and to one that shares the host's: on emulated ones."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import narrowboat as nb
from device_kit import GRAIN, DeviceKit, Tower, held, watched
from narrowboat.errors import (
    BudgetError,
    DeviceMemoryError,
    DigestError,
    PinnedMemoryError,
    QuantityError,
    StreamedModelError,
    UsageError,
)
from narrowboat.stream import device_ground
from narrowboat.stream.staging import staging_bytes

KINDS = ["emulated", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def kit(tmp_path: Path, tiny_blocks: None) -> DeviceKit:
    return DeviceKit(tmp_path)


@pytest.fixture(params=KINDS)
def any_kit(request: pytest.FixtureRequest, tmp_path: Path, tiny_blocks: None) -> DeviceKit:
    return DeviceKit(tmp_path, kind=request.param)


def session_of(model: Any) -> Any:
    return nb.session(model)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "loose"])
@pytest.mark.parametrize("host", ["64MiB", "400KiB", None], ids=["all cached", "some cached", "unsaid"])
@pytest.mark.parametrize("jitter", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_plain_pytorchs_and_every_use_is_in_order(
    tmp_path: Path, tiny_blocks: None, kind: str, packed: bool, host: str | None, jitter: int
) -> None:
    kit = DeviceKit(tmp_path, packed=packed, kind=kind)
    device = kit.device(jitter=jitter)
    model = kit.stream(device, host=host)
    plan = session_of(model).plan
    assert plan.streamed
    assert len(plan.cached) == len(plan.streamed) if host != "400KiB" else 0 < len(plan.cached) < len(plan.streamed)
    with watched(device):
        assert kit.right(model, 5)
    session_of(model).close()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "loose"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_shares_the_hosts_memory_copies_nothing(
    tmp_path: Path, tiny_blocks: None, packed: bool, kind: str
) -> None:
    kit = DeviceKit(tmp_path, packed=packed, kind=kind)
    device = kit.device(unified=True, jitter=2)
    model = kit.stream(device)
    with watched(device):
        assert kit.right(model, 5)
    stats = session_of(model).stats()
    assert stats["device_copied_bytes"] == getattr(device, "copied_in", 0) == 0
    assert stats["copied_bytes"] == 0 or not packed
    assert stats["pinned_bytes"] <= session_of(model).budget


def test_the_device_never_holds_more_than_the_budget_and_gives_it_all_back(kit: DeviceKit) -> None:
    device = kit.device()
    free = device.memory()[0]
    model = kit.stream(device, budget=kit.least(device) + 30_000)
    session = session_of(model)
    with torch.inference_mode():
        for _ in range(4):
            model(kit.x)
            assert free - device.memory()[0] <= session.budget
            assert free - device.memory()[0] == -(-session.plan.arena_bytes // GRAIN) * GRAIN
    session.close()
    assert device.memory()[0] == free
    assert device.pinned_bytes == 0


def test_pinned_memory_stays_within_the_hosts_budget(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    model = any_kit.stream(device, host=500_000)
    assert any_kit.right(model)
    assert 0 < device.pinned_bytes <= 500_000
    assert session_of(model).stats()["pinned_bytes"] == device.pinned_bytes


def test_with_room_in_the_host_storage_is_read_once(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    model = any_kit.stream(device, host="64MiB")
    assert any_kit.right(model, 6)
    session = session_of(model)
    assert session.plan.cached == frozenset(session.plan.streamed)
    assert session.stats()["bytes_read"][-1] == 0
    assert session.stats()["device_copied_bytes"] > 0


def test_without_room_in_the_host_what_streams_is_read_in_every_pass(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    probe = any_kit.stream(device, host="64MiB")
    workers = session_of(probe).prepared.storage.depth
    session_of(probe).close()
    model = any_kit.stream(device, host=staging_bytes(64 << 10, workers))
    assert any_kit.right(model, 4)
    session = session_of(model)
    assert not session.plan.cached
    assert session.stats()["bytes_read"][-1] > 0


def test_with_room_on_the_device_everything_is_copied_once(kit: DeviceKit) -> None:
    device = kit.device()
    model = kit.stream(device, budget="16MiB")
    with watched(device):
        assert kit.right(model, 2)
        copied = device.copied_in
        assert kit.right(model, 2)
    assert device.copied_in == copied
    assert not session_of(model).plan.streamed


@pytest.mark.parametrize("unified", [False, True])
def test_the_budget_changes_between_passes(any_kit: DeviceKit, unified: bool) -> None:
    device = any_kit.device(unified=unified)
    least = any_kit.least(device)
    model = any_kit.stream(device, budget=least)
    session = session_of(model)
    for budget in (least + 100_000, least, "16MiB", least + 50_000):
        session.budget = budget
        with watched(device):
            assert any_kit.right(model, 2)
        assert 0 < held(model) <= session.budget


def test_a_smaller_budget_is_followed_in_the_middle_of_a_pass(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    least = any_kit.least(device)
    model = any_kit.stream(device, budget="16MiB")
    assert any_kit.right(model, 3)
    session = session_of(model)
    seen: list[int] = []

    def shrink(*_: Any) -> None:
        if not seen:
            session.budget = least
        seen.append(held(model))

    model.layers[2].register_forward_hook(shrink)
    model.layers[5].register_forward_hook(shrink)
    with watched(device):
        assert any_kit.right(model, 1)
    assert seen[0] > seen[1] > 0


def test_a_kept_view_keeps_its_values(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    model = any_kit.stream(device)
    kept: list[torch.Tensor] = []
    model.layers[1].register_forward_hook(lambda module, *_: kept.append(module.weight.detach()[:4]))
    assert any_kit.right(model, 2)
    want = any_kit.plain.layers[1].weight[:4]
    assert all(torch.equal(each, want) for each in kept)


def test_state_dict_and_weights_outside_a_pass(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    model = any_kit.stream(device)
    with watched(device):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.clone(), any_kit.plain.state_dict()[name])
        assert torch.equal(model.layers[3].bias.sum(), any_kit.plain.layers[3].bias.sum())
        assert any_kit.right(model, 2)


def test_a_pass_off_the_traced_order_is_right(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    # Its budget has room for a block beside the plan.
    model = any_kit.stream(device, budget=any_kit.least(device) + 200_000)
    with watched(device), torch.inference_mode():
        for layer, plain in zip(reversed(model.layers), reversed(any_kit.plain.layers), strict=True):
            x = any_kit.randn(2, plain.in_features)
            assert torch.equal(layer(x), plain(x))
        assert any_kit.right(model, 2)
    assert session_of(model).engine.jumps


def test_damaged_bytes_are_told_on_a_device_too(any_kit: DeviceKit, tmp_path: Path) -> None:
    raw = bytearray(any_kit.path.read_bytes())
    raw[-5000] ^= 1
    any_kit.path.write_bytes(raw)
    model = any_kit.stream(any_kit.device(), verify="load", budget="16MiB")
    with pytest.raises(DigestError), torch.inference_mode():
        model(any_kit.x)


def test_map_goes_one_by_one_and_says_why(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    model = any_kit.stream(device)
    session = session_of(model)
    with torch.inference_mode(), watched(device):
        assert all(torch.equal(out, any_kit.want) for out in session.map([any_kit.x] * 5, batch=4))
    assert "processor" in session.stats()["map_alone_reason"]


class Straight:
    """Reads a file into an emulated device's memory, as cuFile would into a GPU's."""

    def __init__(self, path: Path, device: Any) -> None:
        self._file = path.open("rb")

    def read(self, offset: int, address: int, nbytes: int) -> None:
        assert (offset | address | nbytes) % 4096 == 0
        found = os.pread(self._file.fileno(), nbytes, offset)
        ctypes.memmove(address, found, len(found))


def test_storage_is_read_straight_into_the_device_where_that_can_be(
    kit: DeviceKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = kit.device(jitter=3)
    monkeypatch.setattr(device_ground.gds, "probe", lambda path, device: "")
    monkeypatch.setattr(device_ground, "GdsReader", Straight)
    model = kit.stream(device, host=400 << 10)
    assert session_of(model).plan.cached
    with watched(device):
        assert kit.right(model, 5)
    stats = session_of(model).stats()
    assert stats["device_direct_refusal"] == ""
    assert 0 < stats["device_copied_bytes"] < sum(stats["bytes_read"])


def test_why_storage_is_not_read_straight_into_the_device_is_told(kit: DeviceKit) -> None:
    assert "not a CUDA device" in session_of(kit.stream(kit.device())).stats()["device_direct_refusal"]


def test_measured_passes_are_the_devices_own(kit: DeviceKit) -> None:
    device = kit.device(bandwidth=20e6)
    model = kit.stream(device, host="64MiB")
    assert kit.right(model, 5)
    session = session_of(model)
    stats = session.stats()
    assert stats["device"] == "emulated"
    assert 10e6 < stats["copy_bytes_per_s"] < 40e6
    # Copies are slower than computing: a pass lasts about as long as its copies, and waits are most of it.
    copying = session.plan.timing.bytes_copied / 20e6
    assert stats["latency_ms"][-1] > 0.5e3 * copying
    assert stats["stall_ms"][-1] > 0.3e3 * copying
    assert session.prepared.measured.identity["device"] == "emulated"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("layer", [0, 3, 6])
def test_after_an_interruption_in_a_pass_the_next_is_right(
    any_kit: DeviceKit, layer: int, error: type[BaseException]
) -> None:
    device = any_kit.device(jitter=5)
    model = any_kit.stream(device, host=400 << 10)
    assert any_kit.right(model, 3)
    strike = [True]

    def interrupt(*_: Any) -> None:
        if strike[0]:
            raise error

    model.layers[layer].register_forward_hook(interrupt)
    with pytest.raises(error), torch.inference_mode():
        model(any_kit.x)
    strike[0] = False
    with watched(device):
        assert any_kit.right(model, 3)


def test_another_trace_with_blocks_of_the_same_sizes_does_not_find_the_first_ones_bytes(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    model = any_kit.stream(device, budget="2MiB", host="64MiB", example=None)  # learns from the first pass
    with watched(device):
        assert any_kit.right(model, 4)
    assert session_of(model).plan.cached == frozenset(session_of(model).plan.streamed)


def test_sessions_share_a_device(any_kit: DeviceKit) -> None:
    device = any_kit.device()
    one, two = any_kit.stream(device, host="1MiB"), any_kit.stream(device)
    with watched(device):
        for _ in range(3):
            assert any_kit.right(one, 1)
            assert any_kit.right(two, 1)
    session_of(one).close()
    assert any_kit.right(two, 2)


def test_a_forgotten_session_gives_everything_back(kit: DeviceKit) -> None:
    device = kit.device()
    free = device.memory()[0]
    model = kit.stream(device)
    assert kit.right(model, 2)
    del model
    for _ in range(100):  # the reader's threads let go of their last job as they end
        gc.collect()
        if device.memory()[0] == free and not device.pinned_bytes:
            break
        time.sleep(0.02)
    assert device.memory()[0] == free
    assert device.pinned_bytes == 0


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "error", "says"),
    [
        ("1GiB", DeviceMemoryError, "has free"),
        ("auto", UsageError, "follows the host's memory"),
        ({"emulated": "6MiB", "cpu": "2MiB"}, UsageError, "fixed when streaming begins"),
        ({"cuda": "6MiB"}, UsageError, "'cuda', which is no memory"),
        ("x", QuantityError, "budget"),
    ],
)
def test_a_sessions_new_budget_is_refused_as_its_first_would_be(
    kit: DeviceKit, budget: Any, error: type[Exception], says: str
) -> None:
    model = kit.stream(kit.device())
    before = session_of(model).budget
    with pytest.raises(error, match=says):
        session_of(model).budget = budget
    assert session_of(model).budget == before
    session_of(model).budget = {"emulated": "6MiB"}
    assert session_of(model).budget == 6 << 20
    assert kit.right(model)


def test_no_more_host_memory_is_pinned_than_is_of_use(kit: DeviceKit) -> None:
    device = kit.device()
    model = kit.stream(device, budget="16MiB", host="8GiB")
    assert device.pinned_bytes < 32 << 20
    assert kit.right(model)


def test_without_a_number_for_the_host_less_is_pinned_where_the_system_gives_less(kit: DeviceKit) -> None:
    device = kit.device(pinnable=4 << 20)
    model = kit.stream(device)
    assert device.pinned_bytes <= 4 << 20
    with watched(device):
        assert kit.right(model, 4)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """OpenMP's threads do not come along to a child either, and it would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, even where the tests were started by a shell in the background, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("what", ["map", "unmap", "reserve", "unreserve"])
def test_ctrl_c_in_the_middle_of_a_change_of_budget_costs_neither_bits_nor_memory(
    kit: DeviceKit, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    device = kit.device()
    free = device.memory()[0]
    model = kit.stream(device)
    assert kit.right(model, 3)
    session = session_of(model)
    done = getattr(device, what)
    struck: list[bool] = []

    def interrupted(*arguments: Any) -> Any:
        result = done(*arguments)
        if not struck:
            struck.append(True)
            signal.raise_signal(signal.SIGINT)  # the main thread hears of it; this one goes on
        return result

    monkeypatch.setattr(device, what, interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.budget = "8MiB"
        time.sleep(1)
    monkeypatch.undo()
    assert struck
    with watched(device):
        assert kit.right(model, 4)
    session.budget = kit.least(device)
    assert kit.right(model, 2)
    session.close()
    assert device.memory()[0] == free


def test_after_ctrl_c_at_any_moment_the_next_pass_is_right(tmp_path: Path, tiny_blocks: None) -> None:
    kit = DeviceKit(tmp_path)
    chance = random.Random(5)
    for unified in (True, False):
        device = kit.device(unified=unified)
        free = device.memory()[0]
        model = kit.stream(device, budget=kit.least(device) + 50_000)
        assert kit.right(model, 3)
        for _ in range(12):
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 8e-3))
            try:
                with torch.inference_mode():
                    for _ in range(50):
                        model(kit.x)
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
            with watched(device):
                assert kit.right(model, 2)
        session_of(model).close()
        assert device.memory()[0] == free


def test_a_forked_child_is_told_and_does_not_hang(kit: DeviceKit, one_thread: None) -> None:
    model = kit.stream(kit.device())
    assert kit.right(model, 2)
    child = os.fork()
    if child == 0:
        try:
            session_of(model).close()
            again = nb.stream(kit.make, kit.path, budget="8MiB", device="emulated:64MiB", example=(kit.x,)).eval()
            os._exit(0 if kit.right(again, 2) else 3)
        except BaseException:
            traceback.print_exc()
            os._exit(4)
    for _ in range(300):
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert kit.right(model, 2)


def test_a_budget_above_the_devices_free_memory_is_refused(kit: DeviceKit) -> None:
    device = kit.device(capacity=5 << 20)
    with pytest.raises(DeviceMemoryError, match=r"budget 6\.00 MiB is above the 5\.00 MiB that emulated has free"):
        kit.stream(device, budget="6MiB")


def test_pinning_refused_leaves_nothing_behind(kit: DeviceKit) -> None:
    device = kit.device(pinnable=100_000)
    free = device.memory()
    with pytest.raises(PinnedMemoryError, match="lower the budget for cpu"):
        kit.stream(device, budget="16MiB", host="8MiB")
    assert device.pinned_bytes == 0
    assert device.memory() == free


def test_memory_taken_by_another_process_is_named_and_the_session_goes_on_later(
    kit: DeviceKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = kit.device(capacity=6 << 20)
    least = kit.least(device)
    model = kit.stream(device, budget=least)
    assert kit.right(model, 3)
    session = session_of(model)
    device.take(taken := device.memory()[0] - 8192)
    with pytest.raises(DeviceMemoryError, match="has free"):
        session.budget = "6MiB"
    assert kit.right(model, 2)
    monkeypatch.setattr("narrowboat.stream.session.new_budget", lambda value, *_: value)  # it goes after that look
    with pytest.raises(DeviceMemoryError, match="cannot be had"):
        session.budget = least + 400_000
    device.take(more := device.memory()[0])
    with pytest.raises(DeviceMemoryError, match="cannot be had"), torch.inference_mode():
        model(kit.x)
    device.take(-taken - more)
    with watched(device):
        assert kit.right(model, 2)


def test_a_host_budget_too_small_for_the_buffers_says_how_much_is_needed(any_kit: DeviceKit) -> None:
    with pytest.raises(BudgetError, match="buffers between storage and the device") as caught:
        any_kit.stream(any_kit.device(), budget="16MiB", host="64KiB")
    model = any_kit.stream(any_kit.device(), budget="16MiB", host=caught.value.minimum)
    assert any_kit.right(model)


@pytest.mark.parametrize(
    ("budget", "error", "says"),
    [
        ({"cpu": "8MiB"}, UsageError, "must name the device"),
        ({"emulated": "8MiB", "cuda": "8MiB"}, UsageError, "'cuda', which is no memory of this session"),
        ({"emulated": "8 apples"}, QuantityError, "budget"),
        ({"emulated": "8MiB", "cpu": "x"}, QuantityError, "budget for cpu"),
        ("auto", UsageError, "follows the host's memory"),
        (1000, BudgetError, "the smallest that can is"),
    ],
)
def test_budgets_that_cannot_be_used(kit: DeviceKit, budget: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        kit.stream(kit.device(), budget=budget)


def test_a_shared_memory_has_one_budget(any_kit: DeviceKit) -> None:
    with pytest.raises(UsageError, match="shares the host's memory"):
        any_kit.stream(any_kit.device(unified=True), budget="8MiB", host="8MiB")


def test_on_the_processor_a_dict_is_its_number(kit: DeviceKit) -> None:
    model = nb.stream(Tower, kit.path, budget={"cpu": "64MiB"}, example=(kit.x,)).eval()
    assert session_of(model).budget == 64 << 20
    assert kit.right(model)
    with pytest.raises(UsageError, match="'cuda', which is no memory"):
        nb.stream(Tower, kit.path, budget={"cpu": "64MiB", "cuda": "1GiB"}, example=(kit.x,))


def test_moving_a_streamed_model_elsewhere_is_refused(kit: DeviceKit) -> None:
    model = kit.stream(kit.device())
    assert model.to("cpu") is model
    with pytest.raises(StreamedModelError, match="cannot be moved"):
        model.to("meta")
