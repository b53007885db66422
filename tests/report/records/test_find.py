"""A file's kind is found from what it says, and what is no record is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narrowboat.errors import NarrowboatError, UsageError
from narrowboat.report.records import find
from narrowboat.report.records.find import load, load_all
from narrowboat.trace import Event, Trace
from report_kit import (
    bench_document,
    generate_document,
    plan_document,
    profile_document,
    run_document,
    task_document,
    train_document,
    train_plan_document,
    write,
)

KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "run": run_document,
    "train": train_document,
    "plan --train": train_plan_document,
    "plan": plan_document,
    "profile": profile_document,
    "bench": bench_document,
    "generate": generate_document,
    "tasks": task_document,
}
BENCHMARKS = Path(__file__).resolve().parents[3] / "docs" / "benchmarks"


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_found_whatever_the_file_is_called(tmp_path: Path, kind: str) -> None:
    assert load(write(tmp_path, "bench-train-run.txt", KINDS[kind]())).kind == kind


def test_a_trace_of_passes_keeps_its_events_and_who_made_it(tmp_path: Path) -> None:
    trace = Trace()
    trace.add(Event("read", "layer.0", 1.0, 1.5, nbytes=7))
    trace.save_chrome(tmp_path / "t.json", about={"command": "narrowboat run", "when": "now"})
    found = load(tmp_path / "t.json")
    assert found.kind == "trace"
    assert [event.nbytes for event in found.value.events()] == [7]
    assert found.about.command == "narrowboat run"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.json")), ids=lambda path: path.stem)
def test_every_benchmark_s_file_is_known(path: Path) -> None:
    found = load(path)
    assert found.kind == "benchmark"
    assert found.value.name == path.stem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("[1, 2]", "a list"),
        ("3", "a number"),
        ('"text"', "a text"),
        ("hello", "no JSON"),
        ('{"latency_ms": [1.0, ', "ends in the middle"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "tells of nothing"),
        ('{"foreign": 1}', "tells of foreign"),
        ('{"error": {"message": "no such\\nmodel"}}', "a command that failed.*no such model"),
        ('{"traceEvents": [{"ph": "X"}]}', "not a trace"),
        ('{"traceEvents": [{"ph": "X", "ts": NaN, "dur": 1, "args": {}}]}', "not a trace"),
        ('{"format": "narrowboat tasks trace 2"}', "no whole trace"),
        ('{"format": "narrowboat tasks trace 99"}', "no trace of tasks"),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(NarrowboatError, match=said) as refused:
        load(path)
    assert "\n" not in str(refused.value)
    assert "r.json" in str(refused.value)


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00", b"\x00" * 100, b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "r.json").write_bytes(raw)
    with pytest.raises(UsageError, match="no JSON"):
        load(tmp_path / "r.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"latency_ms": "fast"},
        {"latency_ms": [float("inf")]},
        {"latency_ms": [-1.0]},
        {"budget_bytes": 1 << 80},
        {"fixed_parts": {"x": "much"}},
        {"memory": [[0.0]]},
        {"blocks": [{"name": "a"}]},
    ],
)
def test_a_record_with_values_that_cannot_be_is_refused_by_place(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"no whole record of run: {next(iter(changes))}"):
        load(write(tmp_path, "r.json", run_document(**changes)))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "MOST", 10)
    with pytest.raises(UsageError, match="takes files up to 10 B"):
        load(write(tmp_path, "r.json", run_document()))


def test_a_folder_gives_the_records_in_it_and_leaves_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "b.json", run_document())
    write(tmp_path, "a.json", task_document(0.5))
    write(tmp_path, "other.json", {"foreign": 1})
    (tmp_path / "notes.txt").write_text("nothing")
    assert [found.kind for found in load_all([tmp_path])] == ["tasks", "run"]


def test_a_folder_without_a_record_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "other.json", {"foreign": 1})
    with pytest.raises(UsageError, match=r"nothing in .* was written by narrowboat.*foreign"):
        load_all([tmp_path])


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no"):
        load(tmp_path / "gone.json")


def test_records_of_before_this_version_are_read_too(tmp_path: Path) -> None:
    """Keys that were added later may be missing."""
    old = {key: value for key, value in run_document().items() if key not in ("blocks", "memory", "about")}
    del old["predicted_ms"]
    assert load(write(tmp_path, "r.json", old)).value.blocks == []
    trace = task_document(0.5)
    del trace["about"]
    assert load(write(tmp_path, "t.json", json.loads(json.dumps(trace)))).about.command == ""
