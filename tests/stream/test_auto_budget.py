"""``budget="auto"``: down at once, up slowly, never below the minimum, and a real cgroup limit is followed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import narrowboat as nb
from narrowboat.machine.cgroup import MemoryCgroup, writable_memory_cgroup
from narrowboat.stream.auto import Hysteresis, initial_budget, memory_pressure

MIB = 1 << 20


def test_less_comes_at_once() -> None:
    assert Hysteresis(10 * MIB, 900 * MIB).wanted(500 * MIB, 200 * MIB, 0.0) is not None


def test_more_has_to_last() -> None:
    rule = Hysteresis(10 * MIB, 900 * MIB)
    answers = [rule.wanted(200 * MIB, 600 * MIB, 0.0) for _ in range(20)]
    assert answers[:19] == [None] * 19
    assert answers[19] is not None
    assert answers[19][0] > 200 * MIB


def test_growth_goes_to_the_least_that_was_seen() -> None:
    rule = Hysteresis(10 * MIB, 900 * MIB)
    last = None
    for spare in (800, 700, 400, 900, 850) * 4:
        last = rule.wanted(200 * MIB, spare * MIB, 0.0)
    assert last is not None
    assert last[0] <= 400 * MIB


def test_a_moment_without_room_starts_the_count_again() -> None:
    rule = Hysteresis(10 * MIB, 900 * MIB)
    spares = (*[600] * 19, 240, *[600] * 19)
    assert [rule.wanted(200 * MIB, spare * MIB, 0.0) for spare in spares] == [None] * 39


def test_pressure_asks_for_less_where_bytes_seem_free() -> None:
    change = Hysteresis(10 * MIB, 900 * MIB).wanted(500 * MIB, 2000 * MIB, 40.0)
    assert change is not None
    assert change[0] < 500 * MIB
    assert "pressure" in change[1]


@given(
    now=st.integers(10 * MIB, 900 * MIB),
    spares=st.lists(st.integers(0, 4000 * MIB), min_size=1, max_size=20),
    pressure=st.floats(0, 100),
)
def test_never_below_the_minimum_nor_above_what_is_of_use(now: int, spares: list[int], pressure: float) -> None:
    rule = Hysteresis(10 * MIB, 900 * MIB)
    for spare in spares:
        change = rule.wanted(now, spare, pressure)
        if change is not None:
            assert 10 * MIB <= change[0] <= 900 * MIB
            assert change[0] != now
            now = change[0]


@given(spare=st.integers(100 * MIB, 900 * MIB))
def test_a_steady_machine_ends_in_a_steady_budget(spare: int) -> None:
    rule, now, changes = Hysteresis(10 * MIB, 900 * MIB), 300 * MIB, 0
    for _ in range(60):
        change = rule.wanted(now, spare, 0.0)
        if change is not None:
            now, changes = change[0], changes + 1
    assert changes <= 1


def test_pressure_is_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "proc/pressure").mkdir(parents=True)
    text = "some avg10=12.50 avg60=1.00 avg300=0.10 total=5\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=2\n"
    (tmp_path / "proc/pressure/memory").write_text(text)
    assert memory_pressure(tmp_path) == 12.5
    assert memory_pressure(tmp_path / "nowhere") == 0.0


def test_the_budget_to_begin_with_is_no_more_than_holds_the_model() -> None:
    budget, why = initial_budget(5 * MIB)
    assert budget == 5 * MIB
    assert "whole model" in why


def test_a_model_streams_with_an_automatic_budget(deep: Any) -> None:
    model = deep.stream(budget="auto")
    assert deep.right(model, 3)
    assert not nb.session(model).plan.streamed


CHILD = """
import json, sys, time, torch
from torch import nn
import narrowboat as nb, narrowboat.stream.api
from narrowboat.profile.warmup import warm_up
torch.set_num_threads(1)
def factory():
    return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(40)])
x = torch.randn(1, 1024)
path = sys.argv[1]
torch.manual_seed(0)
plain = factory()
with torch.inference_mode():
    want = plain(x)
if sys.argv[2] == "pack":
    nb.pack(plain.state_dict(), path)
    raise SystemExit
warm_up()
with torch.inference_mode():
    nb.session(nb.stream(factory, path, budget="60MiB", example=(x,))).close()
    del plain
    print("ready", flush=True)
    input()
    model = nb.stream(factory, path, budget="auto", example=(x,))
    session = nb.session(model)
    first, right = model(x), True
    roomy = session.budget
    print("running", flush=True)
    end = time.monotonic() + 20
    while session.budget >= roomy and time.monotonic() < end:
        right = right and torch.equal(model(x), first)
    right = right and torch.equal(model(x), first)
    print(json.dumps({"roomy": roomy, "tight": session.budget, "right": right}), flush=True)
"""
# It grows in steps: what is taken faster than anybody looks is for the kernel to deal with.
NEIGHBOUR = """
import time
print("here", flush=True)
kept = []
for _ in range(16):
    kept.append(bytearray(4 << 20))
    time.sleep(0.5)
input()
"""


def test_a_neighbour_in_the_same_cgroup_makes_the_budget_shrink(tmp_path: Path) -> None:
    reason = writable_memory_cgroup()
    if reason is not None:
        pytest.skip(reason)
    path = str(tmp_path / "w.safetensors")
    environment = {**os.environ, "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CHILD, path, "pack"], check=True, env=environment)

    def start(*command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=group.enter,
        )

    with MemoryCgroup(2 << 30) as group:
        child = start(CHILD, path, "run")
        neighbour = None
        try:
            assert _line(child) == "ready"
            group.set_limit(group.current() - group.page_cache() + 200 * MIB)
            _go_on(child)
            assert _line(child) == "running"
            neighbour = start(NEIGHBOUR)
            assert _line(neighbour) == "here"
            told = json.loads(_line(child))
            assert told["right"]
            assert told["tight"] < told["roomy"] < 200 * MIB
            assert group.oom_kills() == 0
        finally:
            for process in (child, neighbour):
                if process is not None:
                    process.kill()
                    process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_an_explicit_budget_ends_the_following(deep: Any) -> None:
    model = deep.stream(budget="auto")
    session = nb.session(model)
    assert session.following
    session.budget = deep.minimum
    assert not session.following
    assert deep.right(model, 2)
    assert session.budget == deep.minimum


def test_a_session_can_begin_to_follow_the_machine(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.stream.auto.INTERVAL", 0.01)
    monkeypatch.setattr("narrowboat.stream.auto._LOOKS", 2)
    session = nb.session(deep.stream(budget=deep.minimum))
    for _ in range(2):  # a second time changes nothing
        session.budget = "auto"
    deadline = time.monotonic() + 20
    while session.budget == deep.minimum and time.monotonic() < deadline:
        time.sleep(0.02)
    assert session.budget > deep.minimum
    session.budget = deep.minimum
    while _followers() and time.monotonic() < deadline:  # it may be in the middle of a look
        time.sleep(0.02)
    assert _followers() == 0
    assert session.budget == deep.minimum


def _followers() -> int:
    return [t.name for t in threading.enumerate()].count("narrowboat-auto-budget")
