"""``narrowboat tasks`` on sets that are described by blocks: verdicts, exit codes, files."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from narrowboat.tasks.spec.load import load_tasks
from task_sets_kit import MB, three

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump(three()))
    return path


def test_check_says_what_holds_and_exits_with_the_verdict(narrowboat: Callable[..., Any], file: Path) -> None:
    right = narrowboat("tasks", "check", file)
    assert right.code == 0 and "admitted" in right.out and "19" in right.out
    told = narrowboat("tasks", "check", file, "--json")
    assert told.json()["admitted"] is True and told.json()["memory"]["needed_bytes"] == 194 * MB
    file.write_text(yaml.safe_dump(three(budget=100 * MB)))
    wrong = narrowboat("tasks", "check", file)
    assert wrong.code == 1 and "refused" in wrong.out and "would help" in wrong.out
    assert narrowboat("tasks", "check", file, "--json").code == 1


def test_a_wrong_description_is_wrong_usage_in_one_line(narrowboat: Callable[..., Any], file: Path) -> None:
    file.write_text("budget: 1MiB\ntask: []\n")
    for command in ("check", "simulate", "run"):
        found = narrowboat("tasks", command, file)
        assert found.code == 2 and "Traceback" not in found.err and "unknown field" in found.err
    assert narrowboat("tasks", "check", file.parent / "none.yaml").code == 2


def test_what_is_simulated_is_written_conforms_and_can_be_drawn(
    narrowboat: Callable[..., Any], file: Path, tmp_path: Path
) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "picture.png"
    ran = narrowboat("tasks", "simulate", file, "--seconds", "2", "--trace", trace, "--json")
    assert ran.code == 0 and ran.json()["missed"] == 0
    judged = narrowboat("tasks", "conform", trace)
    assert judged.code == 0 and "valid: no premise broken" in judged.out
    assert narrowboat("tasks", "plot", trace, "--out", picture).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert narrowboat("tasks", "plot", trace, "--out", picture, "--from", "50s").code == 2
    trace.write_text("{}")
    assert narrowboat("tasks", "conform", trace).code == 1


def test_overload_is_simulated_with_its_misses(narrowboat: Callable[..., Any], file: Path) -> None:
    told = three()
    told["tasks"][2]["period"] = "50ms"
    file.write_text(yaml.safe_dump(told))
    ran = narrowboat("tasks", "simulate", file, "--seconds", "1", "--json")
    assert ran.code == 1 and ran.json()["missed"] > 0


def test_a_set_of_blocks_cannot_be_run(narrowboat: Callable[..., Any], file: Path) -> None:
    found = narrowboat("tasks", "run", file)
    assert found.code == 2 and "simulate the set" in found.err


def test_the_schema_is_json(narrowboat: Callable[..., Any]) -> None:
    assert narrowboat("tasks", "schema").json()["title"] == "narrowboat tasks"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_can_be_read(path: Path) -> None:
    assert len(load_tasks(path).tasks) >= 3


def test_a_device_is_never_replaced_by_a_file(narrowboat: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for command in (
        ("simulate", file, "--seconds", "0.1", "--trace", pipe),
        ("simulate", file, "--seconds", "0.1", "--trace", tmp_path),
    ):
        found = narrowboat("tasks", *command)
        assert found.code == 1 and "no ordinary file" in found.err
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    trace = tmp_path / "t.json"
    assert narrowboat("tasks", "simulate", file, "--seconds", "0.1", "--trace", trace).code == 0
    assert narrowboat("tasks", "plot", trace, "--out", pipe).code == 1
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_run_without_jobs_is_no_evidence(narrowboat: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    assert narrowboat("tasks", "simulate", file, "--seconds", "0.1", "--trace", trace).code == 0
    told = json.loads(trace.read_text())
    trace.write_text(json.dumps({**told, "jobs": [], "segments": [], "memory": []}))
    found = narrowboat("tasks", "conform", trace)
    assert found.code == 1 and "no job was released" in found.out
