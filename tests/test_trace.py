"""The timeline: bounded, and readable by Perfetto."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from narrowboat.trace import LANES, Event, Trace


def test_the_oldest_events_make_room() -> None:
    trace = Trace(limit=3)
    for i in range(5):
        trace.add(Event("read", f"block{i}", i, i + 0.5))
    assert [event.name for event in trace.events()] == ["block2", "block3", "block4"]


def test_events_since_a_moment_are_those_that_end_after_it() -> None:
    trace = Trace()
    for i in range(4):
        trace.add(Event("compute", str(i), i, i + 1))
    assert [event.name for event in trace.events(since=2)] == ["2", "3"]
    assert trace.events(since=4) == []


def test_events_cannot_be_altered() -> None:
    with pytest.raises(AttributeError):
        Event("read", "a", 0, 1).start = 5  # type: ignore[misc]


def test_the_file_is_chrome_trace_json_with_a_lane_per_reader(tmp_path: Path) -> None:
    trace = Trace()
    trace.add(Event("read", "layer", 1.0, 1.5, nbytes=4096, worker=1))
    trace.add(Event("compute", 'a "quoted" näme', 1.5, 1.75))
    trace.add(Event("stall", "layer", 1.75, 2.0))
    trace.save_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = [event for event in events if event["ph"] == "M"]
    timed = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["name"] for event in named} >= set(LANES)
    assert [(e["name"], e["ts"], e["dur"]) for e in timed] == [
        ("layer", 1e6, 5e5),
        ('a "quoted" näme', 1.5e6, 2.5e5),
        ("layer", 1.75e6, 2.5e5),
    ]
    assert timed[0]["args"] == {"bytes": 4096}
    assert len({event["tid"] for event in timed}) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_saving_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("something longer than what comes " * 100)
    Trace().save_chrome(path)
    assert isinstance(json.loads(path.read_text())["traceEvents"], list)


def test_events_can_be_added_while_they_are_read() -> None:
    trace = Trace(limit=100)
    done = threading.Event()
    failed: list[BaseException] = []

    def add() -> None:
        while not done.is_set():
            trace.add(Event("read", "x", 0, 1))

    thread = threading.Thread(target=add)
    thread.start()
    try:
        for _ in range(3000):
            trace.events()
    except RuntimeError as error:
        failed.append(error)
    finally:
        done.set()
        thread.join()
    assert failed == []
