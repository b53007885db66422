"""What is spilled where: by the rates of the bus and of the folder, and within the room that there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowboat.train.device.offload
from narrowboat.train.device.bandwidth import measure_copies
from narrowboat.train.measure.chain import Rates, Techniques, build_chain
from narrowboat.train.measure.fake import fake_walk
from narrowboat.train.spill_room import plan_with_room
from narrowboat.train.step import TrainStep
from train_kit import GPT, budget_of, cross_entropy

MIB = 1 << 20
MakeStep = Callable[..., TrainStep]


def gpt() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    text = torch.randint(0, 50, (16, 65))
    return GPT(depth=3, width=64, dropout=0.0).train(), (text[:, :-1].clone(), text[:, 1:].clone())


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def of(bandwidth: float) -> None:
        monkeypatch.setattr(narrowboat.train.device.offload, "measure_copies", lambda device: (bandwidth, bandwidth))

    return of


# -- by rates --------------------------------------------------------------------------------------------------------


def planned(step: TrainStep, batch: Any, share: float) -> Any:
    step.budget = budget_of(step.prepare(*batch), share)
    return step.prepare(*batch)


def test_a_fast_bus_is_used_and_a_slow_one_is_not(on_device: MakeStep, bus: Callable[[float], None]) -> None:
    model, batch = gpt()
    bus(1e15)
    fast = planned(on_device(model, batch), batch, 0.4)
    assert fast.offloaded > 4 * MIB and "recomputed" not in fast.schedule
    bus(1e3)
    slow = planned(on_device(model, batch), batch, 0.4)
    assert slow.offloaded == 0 and "recomputed" in slow.schedule


def test_pinned_memory_comes_before_the_folder(
    on_device: MakeStep, bus: Callable[[float], None], tmp_path: Path
) -> None:
    model, batch = gpt()
    bus(1e12)
    roomy = planned(on_device(model, batch, spill=tmp_path), batch, 0.4)
    assert roomy.offloaded > 0 and roomy.spilled == 0
    tight = planned(on_device(model, batch, host="4MiB", spill=tmp_path, techniques=["spill"]), batch, 0.0)
    assert tight.spilled > 0
    assert tight.offloaded == tight.at_once


def test_techniques_without_spill_leave_everything_on_the_device(on_device: MakeStep, device: Any) -> None:
    model, batch = gpt()
    step = on_device(model, batch, techniques=["recompute"])
    assert step._pool is None and device.pinned_bytes == 0
    assert any("spill: switched off" in reason for reason in step.plan.refused)
    assert any("compact: masks and indices on a device" in reason for reason in step.plan.refused)


# -- within the room -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [1, 3, 9, 64])
def test_no_plan_spills_more_than_there_is_room_for(
    host: int, on_device: MakeStep, bus: Callable[[float], None]
) -> None:
    model, batch = gpt()
    bus(1e15)
    step = on_device(model, batch, host=f"{host}MiB", techniques=["spill", "recompute", "reduce"])
    found = []
    for share in (0.0, 0.1, 0.25, 0.5, 0.9):
        plan = planned(step, batch, share)
        assert plan.at_once <= step._pool.room_for
        found.append(plan.at_once)
    assert max(found) > 0 or host == 1
    assert step._pool.pinned_bytes <= host * MIB


def test_micro_batches_in_lockstep_share_the_room(on_device: MakeStep, bus: Callable[[float], None]) -> None:
    bus(1e15)
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Sequential(nn.Conv2d(3 if not n else 16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()) for n in range(4)],
        nn.Flatten(),
        nn.LazyLinear(10),
    )
    batch = torch.randn(16, 3, 24, 24), torch.randint(0, 10, (16,))
    model(batch[0])
    options: dict[str, Any] = {"batch_norm": "lockstep", "micro_batches": 2, "enforce": False}
    step = on_device(model, batch, host="1MiB", **options)
    for share in (0.0, 0.3, 0.6):
        plan = planned(step, batch, share)
        assert plan.parts == 2 and plan.at_once == plan.offloaded <= step._pool.room_for


def chain(rates: Rates) -> Any:
    model, (x, y) = gpt()
    tape = fake_walk(model, lambda a, b: cross_entropy(model(a), b), x, y, len(x))
    for op in tape.ops:
        op.seconds = 1e-3 * (1 + len(op.read))
    return build_chain(tape, Techniques(), rates)


def spilling(made: Any) -> set[int]:
    return {number for options in made.options for option in options for number in option.spilled}


def test_units_that_may_spill_fit_into_the_limit_and_cost_most_to_recompute() -> None:
    rates = Rates(host_write=1e-9, host_read=1e-9, host_room=6 * MIB)
    free, bound = chain(rates.at("host", 20 * MIB, 1 << 40)), chain(rates.at("host", 20 * MIB, 6 * MIB))
    nbytes = [storage.nbytes for storage in bound.tape.storages]
    assert sum(nbytes[number] for number in spilling(free)) > 9 * MIB and free.chain.has_storage
    chosen = sum(nbytes[number] for number in spilling(bound))
    assert 4 * MIB < chosen <= 6 * MIB
    assert not bound.chain.has_storage, "boundaries would not be within the limit"

    def worth(made: Any, *, may: bool) -> list[float]:
        found = []
        for unit, options in zip(made.chain.units, made.options, strict=True):
            moved = sum(nbytes[n] for n in max((option.spilled for option in options), key=len, default=()))
            whole = next(
                (sum(nbytes[n] for n in each.spilled) for each in free.options[len(found)] if each.spilled), 0
            )
            found.append(unit.replay / whole if whole and bool(moved) is may else -1.0)
        return [each for each in found if each >= 0]

    assert max(worth(bound, may=True)) >= max(worth(bound, may=False))
    assert min(worth(bound, may=True)) > min(worth(bound, may=False))


def test_nothing_is_spilled_that_pinned_memory_is_too_small_for() -> None:
    rates = Rates(write=1e-9, read=1e-9, host_write=1e-9, host_read=1e-9, host_room=MIB // 2)
    made = chain(rates.at("storage", 20 * MIB, MIB // 2))
    nbytes = [storage.nbytes for storage in made.tape.storages]
    assert max(nbytes) > MIB // 2 and {nbytes[number] > MIB // 2 for number in spilling(made)} == {False}
    assert chain(replace(rates, host_room=MIB).at("storage", 20 * MIB, MIB)).chain.has_storage


def test_batches_of_two_kinds_each_have_their_room(
    on_device: MakeStep, bus: Callable[[float], None], tmp_path: Path
) -> None:
    model, large = gpt()
    bus(1e15)
    small = tuple(tensor[:, :32].clone() for tensor in large)
    step = on_device(model, large, host="4MiB", spill=tmp_path, techniques=["spill"])
    written = []
    for batch in (large, small, large, small, large):
        step(*batch)
        written.append(step.report().steps[-1].spilled)
        assert step._pool._pass_beyond == max(0, step.plan.at_once - step._pool.room_for)
        step._pool.rest()
        assert step._pool.bytes_in_slots == 0
    # How much goes on to storage depends on how quickly pinned memory is free again; never which batch needs more.
    assert max(written[1], written[3]) < min(written[0], written[2], written[4])


def test_levels_and_rates() -> None:
    on_host = Rates(write=2e-9, read=1e-9)
    assert on_host.levels == ("storage",) and on_host.at("storage", 100, 0) == on_host
    assert on_host.exposed(10.0, 0.0) == pytest.approx(3.0)
    device = Rates(write=2e-9, read=1e-9, host_write=1e-10, host_read=2e-10, host_room=60)
    assert device.levels == ("host", "storage")
    near, far = device.at("host", 100, 60), device.at("storage", 100, 60)
    assert (near.write, near.read, near.limit, near.largest) == (1e-10, 2e-10, 60, 60)
    assert (far.limit, far.largest) == (None, 60)
    assert far.write == pytest.approx(1e-10 + 0.4 * 2e-9) and far.read == pytest.approx(2e-10 + 0.4 * 1e-9)
    assert device.at("storage", 50, 60).write == pytest.approx(1e-10), "all that there is fits"
    # An engine hides no more than what is computed meanwhile.
    assert near.exposed(10.0, 2.0) == pytest.approx(8.0)
    assert near.exposed(10.0, 100.0) == pytest.approx(3.0)
    assert Rates(host_write=1e-10, host_read=1e-10).levels == ()


# -- where there is no room ------------------------------------------------------------------------------------------


def test_a_folder_without_room_leaves_what_fits_into_pinned_memory(
    on_device: MakeStep, bus: Callable[[float], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from narrowboat.errors import SpillError
    from narrowboat.train.spill import SpillPool

    def full(pool: SpillPool, nbytes: int) -> None:
        raise SpillError("reserving 1 TiB failed: No space left on device")

    model, batch = gpt()
    bus(1e15)
    monkeypatch.setattr(SpillPool, "ensure", full)
    for _ in range(4):  # what operators took on a busy machine can make computing anew the cheaper for all of it
        step = on_device(model, batch, 1.0, host="4MiB", spill=tmp_path, techniques=["spill", "recompute", "reduce"])
        step.budget = int(0.5 * step.plan.plain_peak)
        step(*batch)
        if step.report().steps[-1].offloaded:
            break
    assert 0 < step.report().steps[-1].offloaded <= step._pool.room_for
    assert step.plan.spilled == step.report().steps[-1].spilled == 0
    assert any("No space left" in reason for reason in step.plan.refused)
    assert "less of the activations is spilled" in str(step.report().changes)


def test_where_pinning_is_refused_for_a_plan_nothing_is_spilled(
    make_device: Any, on_device: MakeStep, bus: Callable[[float], None]
) -> None:
    model, batch = gpt()
    bus(1e15)
    device = make_device(pinnable=1 << 20)
    step = on_device(model, batch, 0.4, device=device)
    step(*batch)
    assert step.report().steps[-1].offloaded == 0 and step.report().steps[-1].replays > 0
    assert any("lower the budget for cpu" in reason for reason in step.plan.refused)
    planner = step._preparation.planner(*batch)
    assert (
        planner.premises.rates.levels == () and plan_with_room(planner, step.budget, step._pool, print).offloaded == 0
    )


def test_a_bus_is_measured_by_the_devices_clock(make_device: Any) -> None:
    device = make_device(bandwidth=64 * MIB)
    out, back = measure_copies(device, 4 * MIB)
    assert out == pytest.approx(64 * MIB, rel=0.5) and back == pytest.approx(64 * MIB, rel=0.5)
    assert device.pinned_bytes == 0
