"""The executor's process, from a description to a record; and its death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from narrowboat import TaskSet
from narrowboat.errors import ExecutorError, WeightsNotFoundError
from narrowboat.report.tasks import draw_tasks
from narrowboat.tasks.record import Record
from narrowboat.tasks.summary import summarise
from task_sets_kit import ANYWHERE, assert_premises

YAML = """\
budget: 60MiB
margin: 4
calibration: 200ms
tasks:
  - {name: deep, model: "tasks_test_nets:deep", weights: deep.safetensors, period: 500ms}
  - {name: other, model: "tasks_test_nets:other", weights: other.safetensors, period: 250ms}
  - {name: twin, model: "tasks_test_nets:other", weights: other.safetensors, period: 250ms, guarantee: best-effort}
"""


@pytest.fixture(scope="module")
def described(nets: Path) -> TaskSet:
    (nets / "tasks.yaml").write_text(YAML)
    task_set = TaskSet.load(nets / "tasks.yaml")
    task_set.admit()
    return task_set


def test_a_description_is_admitted_run_and_conforms(described: TaskSet, nets: Path) -> None:
    verdict = described.admit()
    assert verdict.admitted and verdict.needed_bytes <= verdict.budget
    pictures: list[dict[str, object]] = []
    described.run(2, on_tick=pictures.append).save(nets / "trace.json")
    record = Record.load(nets / "trace.json")
    figures = {task.name: task for task in summarise(record).tasks}
    assert (figures["deep"].jobs, figures["other"].jobs, figures["twin"].jobs) == (4, 8, 8)
    assert figures["deep"].done >= 1 and figures["other"].done >= 1
    assert_premises(record, *ANYWHERE)
    assert {"deep", "other", "twin"} == set(pictures[-1]["tasks"])  # type: ignore[call-overload]
    draw_tasks(record, nets / "picture.png")
    assert (nets / "picture.png").stat().st_size > 10_000


def test_measurements_are_kept_and_foreign_ones_are_not_used(described: TaskSet, nets: Path) -> None:
    kept = sorted((nets / "cache" / "tasks").iterdir(), key=lambda path: path.stat().st_size)
    assert len(kept) == 2
    stamp = kept[0].stat().st_mtime_ns
    foreign = json.loads(kept[1].read_text())
    kept[1].write_text(json.dumps({**foreign, "digest": "foreign"}))
    again = TaskSet.load(nets / "tasks.yaml")
    assert len(again.costed) == 3
    assert kept[0].stat().st_mtime_ns == stamp
    assert json.loads(kept[1].read_text())["digest"] == foreign["digest"]
    # Two tasks that run one network hold its weights once.
    assert again.costed[1].network == again.costed[2].network != again.costed[0].network


def test_missing_weights_are_named_with_their_task(described: TaskSet, nets: Path) -> None:
    (nets / "wrong.yaml").write_text(YAML.replace("weights: deep.safetensors", "weights: gone.safetensors"))
    with pytest.raises(WeightsNotFoundError, match="task 'deep'"):
        TaskSet.load(nets / "wrong.yaml").admit()


def test_an_executor_that_is_killed_is_an_error_and_leaves_nothing(described: TaskSet) -> None:
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    seen: list[int] = []

    def kill(picture: object) -> None:
        told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
        for pid in map(int, () if seen else told.stdout.split()):
            command = Path(f"/proc/{pid}/cmdline")
            if command.exists() and b"execute.child" in command.read_bytes():
                seen.append(pid)
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(ExecutorError, match="killed by SIGKILL"):
        described.run(30, on_tick=kill)
    assert seen
    assert (set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()) == shared
