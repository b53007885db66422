"""The budget changes while the session lives: right answers, memory given back, nothing read twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import narrowboat as nb
from narrowboat.arena.slab import Slab
from narrowboat.errors import (
    BudgetError,
    NarrowboatError,
    QuantityError,
    SessionClosedError,
    StreamedModelError,
    UsageError,
)
from narrowboat.stream.blocks import held_ranges, home
from narrowboat.stream.session import Session

MIB = 1 << 20
ROOMY = 8 * MIB  # holds everything


def assert_right(deep: Any, model: Any, passes: int = 1) -> None:
    assert deep.right(model, passes)


def test_a_shrink_takes_effect_before_the_assignment_returns(deep: Any) -> None:
    model = deep.stream(budget=ROOMY)
    session = nb.session(model)
    assert_right(deep, model, 2)
    before = session.ledger.held()["resident"]
    session.budget = deep.minimum
    assert session.budget == session.plan.budget == deep.minimum
    held = session.ledger.held()
    assert held.get("resident", 0) + held["window"] <= deep.minimum < before + session.plan.fixed_bytes
    assert_right(deep, model, 3)
    assert session.stats()["bytes_read"][-1] > 0


def test_a_size_as_people_write_it_is_taken(deep: Any) -> None:
    session = nb.session(deep.stream(budget=ROOMY))
    session.budget = "5 MiB"
    assert session.budget == 5 * MIB


def test_growing_reads_only_what_was_not_there(deep: Any) -> None:
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    assert_right(deep, model, 4)
    kept = session.plan.resident_bytes
    assert 0 < kept < session.plan.weight_bytes
    resident = session.plan.resident
    session.reader.drain()
    read_before = session.reader.bytes_read
    session.budget = ROOMY
    assert_right(deep, model, 2)
    session.reader.drain()
    stayed = sum(session.plan.blocks[i].read_bytes for i in resident & session.plan.resident)
    everything = sum(block.read_bytes for block in session.plan.blocks)
    assert stayed > 0
    assert session.reader.bytes_read - read_before <= everything - stayed
    assert not session.plan.streamed


def test_weights_that_stay_resident_keep_their_address(deep: Any) -> None:
    model = deep.stream(budget=ROOMY)
    session = nb.session(model)
    assert_right(deep, model, 2)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters() if _is_in(p)}
    session.budget = deep.minimum + MIB
    assert_right(deep, model)
    stayed = [name for name, p in model.named_parameters() if name in addresses and _is_in(p)]
    resident = {session.plan.blocks[i].name for i in session.plan.resident}
    same = [name for name in stayed if name.rsplit(".", 1)[0] in resident]
    assert same
    assert all(dict(model.named_parameters())[name].data_ptr() == addresses[name] for name in same)


def test_a_grow_reads_nothing_that_is_already_there(deep: Any) -> None:
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    session.settled = True  # no plan but those asked for
    assert_right(deep, model, 2)
    there = {block.index for block in session.engine.arrived()}
    streaming = there - session.plan.resident
    assert streaming
    before = session.reader.bytes_read
    session.budget = ROOMY
    assert not session.plan.streamed
    assert_right(deep, model, 1)
    missing = sum(block.read_bytes for i, block in enumerate(session.plan.blocks) if i not in there)
    assert session.reader.bytes_read - before == missing


def test_blocks_that_stream_on_from_the_same_place_are_not_read_again(deep: Any) -> None:
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    session.settled = True
    assert_right(deep, model, 2)
    there = {block.index for block in session.engine.arrived()}
    places = {i: session.plan.offsets[i] for i in session.plan.streamed}
    session.budget = deep.minimum + MIB + 64 * 1024
    stay = {i for i in there & set(session.plan.streamed) if session.plan.offsets[i] == places.get(i)}
    assert stay <= {block.index for block in session.engine.arrived()}
    assert_right(deep, model, 2)


def _is_in(parameter: torch.Tensor) -> bool:
    try:
        parameter.data_ptr()
    except NarrowboatError:
        return False
    return True


@pytest.mark.parametrize("value", [1000, "1KiB"])
def test_a_budget_below_the_minimum_is_refused_and_the_old_one_stays(deep: Any, value: Any) -> None:
    model = deep.stream(budget=ROOMY)
    session = nb.session(model)
    plan = session.plan
    with pytest.raises(BudgetError) as refused:
        session.budget = value
    assert refused.value.minimum == session.min_budget
    assert session.plan is plan
    assert session.budget == ROOMY
    assert_right(deep, model, 2)


def test_what_is_no_size_is_refused(deep: Any) -> None:
    session = nb.session(deep.stream(budget=ROOMY))
    with pytest.raises(QuantityError):
        session.budget = "12 apples"
    assert session.budget == ROOMY


def test_a_closed_session_has_no_budget_to_change(deep: Any) -> None:
    session = nb.session(deep.stream(budget=ROOMY))
    session.close()
    with pytest.raises(SessionClosedError):
        session.budget = ROOMY


def test_every_change_is_in_the_trace_with_its_cause(deep: Any) -> None:
    session = nb.session(deep.stream(budget=ROOMY))
    session.budget = "5MiB"
    session.change_budget("6MiB", cause="a neighbour left")
    told = [event for event in session.trace().events() if event.lane == "budget"]
    assert [event.nbytes for event in told] == [5 * MIB, 6 * MIB]
    assert "asked" in told[0].name
    assert "a neighbour left" in told[1].name


def test_random_changes_between_passes_never_change_an_answer(deep: Any) -> None:
    model = deep.stream()
    session = nb.session(model)
    chance = random.Random(0)
    for _ in range(100):
        session.budget = chance.randint(deep.minimum, ROOMY)
        held = session.ledger.held()
        assert held.get("resident", 0) + held.get("window", 0) <= session.budget - session.plan.fixed_bytes
        assert_right(deep, model, chance.randint(0, 3))
    deep.assert_state(model.state_dict())


@pytest.mark.parametrize("at", [1, 4, 8])
def test_less_takes_effect_within_a_pass_at_a_block_boundary(deep: Any, at: int) -> None:
    model = deep.stream(budget=ROOMY)
    session = nb.session(model)
    assert_right(deep, model, 3)
    seen: list[int] = []

    def shrink() -> None:
        thread = threading.Thread(target=setattr, args=(session, "budget", deep.minimum))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()

    model.before[at] = shrink
    model.before[at + 1] = lambda: seen.append(session.budget)
    assert_right(deep, model)
    assert seen == [deep.minimum]
    model.before.clear()
    assert session.plan.streamed
    assert_right(deep, model, 3)


def test_more_comes_at_the_end_of_the_pass(deep: Any) -> None:
    model = deep.stream()
    session = nb.session(model)
    assert_right(deep, model)
    seen: list[int] = []

    def grow() -> None:
        session.budget = ROOMY
        seen.append(session.budget)

    model.before[3] = grow
    model.before[9] = lambda: seen.append(session.budget)
    assert_right(deep, model)
    model.before.clear()
    assert seen == [deep.minimum, deep.minimum]
    assert session.budget == ROOMY
    assert_right(deep, model, 2)


def test_the_last_of_several_changes_wins(deep: Any) -> None:
    model = deep.stream(budget=ROOMY)
    session = nb.session(model)

    def change() -> None:
        session.budget = "5MiB"
        session.budget = "7MiB"

    model.before[2] = change
    assert_right(deep, model)
    model.before.clear()
    assert session.budget == 7 * MIB


def test_changes_from_another_thread_while_passes_run(deep: Any) -> None:
    model = deep.stream(budget=ROOMY)
    session = nb.session(model)
    stop = threading.Event()
    problems: list[BaseException] = []

    def change() -> None:
        chance = random.Random(1)
        while not stop.is_set():
            try:
                session.budget = chance.randint(deep.minimum, ROOMY)
            except BaseException as error:
                problems.append(error)
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert_right(deep, model, 300)
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()
    assert problems == []
    assert_right(deep, model, 2)


def test_a_view_kept_over_a_shrink_keeps_its_bytes(deep: Any) -> None:
    model = deep.stream(budget=ROOMY)
    assert_right(deep, model, 2)
    kept = [layer.fc.weight.view(-1) for layer in model.layers]
    nb.session(model).budget = deep.minimum
    assert_right(deep, model, 2)
    for view, layer in zip(kept, deep.plain.layers, strict=True):
        assert torch.equal(view, layer.fc.weight.view(-1))


def test_what_a_plan_holds_never_overlaps(deep: Any) -> None:
    session = nb.session(deep.stream(budget=ROOMY))
    for budget in range(deep.minimum, ROOMY, 300_000):
        session.budget = budget
        ranges = sorted(held_ranges(session.plan))
        assert all(low + n <= high for (low, n), (high, _) in pairwise(ranges))
        assert sum(n for _, n in ranges) == session.plan.arena_bytes
        assert all(at + n <= home(session.plan)[-1] + session.plan.window_bytes for at, n in ranges)


CHILD = """
import json, sys, torch
from torch import nn
import narrowboat as nb
from narrowboat.machine.memory import process_memory, reset_peak
torch.set_num_threads(1)
def factory():
    return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(20)])
x = torch.randn(1, 1024)
plain = factory()
nb.pack(plain.state_dict(), sys.argv[1])
with torch.inference_mode():
    want = plain(x)
    del plain
    model = nb.stream(factory, sys.argv[1], budget="130MiB", example=(x,))
    session = nb.session(model)
    base = session.stats()["baseline_bytes"]
    told = {"right": True, "over": []}
    for _ in range(3):
        told["right"] &= torch.equal(model(x), want)
    told["roomy"] = process_memory().rss - base
    for budget in (30 << 20, 110 << 20, 24 << 20, 60 << 20):
        session.budget = budget
        reset_peak()
        told["right"] &= torch.equal(model(x), want)
        told["over"].append(process_memory().hwm - base - budget)
print(json.dumps(told))
"""


def test_the_first_pass_after_a_cut_is_within_the_new_budget(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "w.safetensors")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"},
    )
    told = json.loads(child.stdout.splitlines()[-1])
    assert told["right"]
    assert told["roomy"] > 78 * MIB
    assert [over for over in told["over"] if over > 0] == []


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("where", [(Slab, "hold"), (Slab, "release"), (Session, "_use")], ids=lambda w: w[1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_change_leaves_the_plan_before_it_in_force(
    deep: Any, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str], grows: bool, error: type[BaseException]
) -> None:
    model = deep.stream(budget=deep.minimum if grows else ROOMY)
    session = nb.session(model)
    assert_right(deep, model, 2)
    before = session.budget
    with monkeypatch.context() as patched:

        def strike(*args: Any, **kwargs: Any) -> None:
            raise error

        patched.setattr(*where, strike)
        with pytest.raises(error):
            session.budget = ROOMY if grows else deep.minimum
    assert session.budget == before == session.plan.budget
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter + 0, deep.plain.state_dict()[name])
    assert_right(deep, model, 2)
    session.budget = 5 * MIB
    assert_right(deep, model, 2)


def test_a_change_that_would_lose_a_written_weight_is_refused_and_nothing_moves(deep: Any) -> None:
    model = deep.stream(budget=ROOMY)
    session = nb.session(model)
    assert_right(deep, model, 2)
    weight = next(iter(model.parameters()))
    with torch.no_grad():
        weight.mul_(2)
        changed = weight.clone()
    with pytest.raises(StreamedModelError, match="modified in place"):
        session.budget = deep.minimum
    assert session.budget == ROOMY == session.plan.budget
    assert torch.equal(weight, changed)
    with torch.inference_mode():
        assert model(deep.x).shape == deep.want.shape


def test_a_scheme_that_needs_more_says_so_to_the_one_who_asks(deep: Any) -> None:
    model = deep.stream(budget=40 * MIB, scheme="swapnet")
    session = nb.session(model)
    session.settled = True  # passes may turn out to need so little that the scheme fits
    assert_right(deep, model, 2)
    with pytest.raises(BudgetError, match="cannot hold"):
        session.budget = deep.minimum
    assert session.budget == 40 * MIB
    assert_right(deep, model, 2)


def test_a_plan_for_passes_with_pauses_foresees_no_more_than_one_for_passes_back_to_back(deep: Any) -> None:
    model = deep.stream(budget=deep.minimum, objective="latency")
    session = nb.session(model)
    assert session.prepared.workload()[0].from_idle
    session.prepared.objective = "throughput"
    steady = session.prepared.choose(session.machine, deep.minimum)[0]
    session.prepared.objective = "latency"
    assert session.plan.lower_bound <= session.plan.predicted_latency <= steady.predicted_latency * 1.01
    assert_right(deep, model, 3)
    session.budget = deep.minimum + MIB  # no table was made for this objective
    assert_right(deep, model, 2)


def test_another_objective_is_refused(deep: Any) -> None:
    with pytest.raises(UsageError, match="objective must be one of throughput, latency, not 'energy'"):
        deep.stream(objective="energy")


def test_a_forked_child_is_refused_and_can_close(deep: Any) -> None:
    model = deep.stream(budget=ROOMY)
    session = nb.session(model)
    assert_right(deep, model, 2)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            session.budget = deep.minimum
        except SessionClosedError:
            session.close()
            code = 0
        finally:
            os._exit(code)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for ever")
    assert os.waitstatus_to_exitcode(status) == 0
    assert_right(deep, model, 2)


def test_a_table_makes_changes_without_a_search(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from narrowboat.report.curve import pareto

    model = deep.stream(budget=ROOMY)
    session = nb.session(model)
    assert_right(deep, model, 3)
    prepared = session.prepared
    assert prepared.measured is not None
    monkeypatch.setattr(prepared.measured, "table", pareto(prepared, session.machine).to_json())
    monkeypatch.setattr("narrowboat.stream.prepare.make_plan", None)
    for budget in (deep.minimum + MIB, deep.minimum + MIB // 2, ROOMY, deep.minimum + MIB):
        session.budget = budget
        assert session.plan.budget == budget
        assert session.plan.arena_bytes + session.plan.fixed_bytes <= budget
        assert_right(deep, model, 2)
