"""tasks.yaml: what is read, and what a wrong line is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from narrowboat.errors import TaskSpecError
from narrowboat.tasks.spec.load import load_tasks, parse_tasks, tasks_from
from narrowboat.tasks.spec.schema import json_schema

RIGHT = """\
budget: 200MB
supply: {share: 0.85, delay: 12ms}
tasks:
  - name: camera
    period: 50ms
    deadline: 40ms
    activation_bytes: 4MB
    blocks:
      - {load: 2ms, compute: 3ms, bytes: 20MB}
      - {load: 2.5ms, compute: 0.1, bytes: 0}
  - name: client
    contract: {burst: 3, period: 50ms}
    deadline: 90ms
    guarantee: best-effort
    blocks: [{compute: 4ms}]
"""


def test_times_are_microseconds_and_sizes_bytes() -> None:
    told = parse_tasks(RIGHT)
    camera, client = told.tasks
    assert (told.budget, told.supply.share, told.supply.delay) == (200_000_000, 0.85, 12_000)
    assert (camera.step, camera.relative_deadline, camera.activation_bytes) == (50_000, 40_000, 4_000_000)
    assert camera.blocks is not None
    assert [(b.load, b.compute, b.bytes) for b in camera.blocks] == [(2000, 3000, 20_000_000), (2500, 100_000, 0)]
    assert (client.step, client.interval, client.guaranteed) == (50_000, 150_000, False)


def test_what_another_process_is_told_is_the_same() -> None:
    told = parse_tasks(RIGHT)
    assert tasks_from(json.loads(json.dumps(told.plain()))) == told


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("budget: 200MB", "budgte: 200MB", 1, "budgte: unknown field; did you mean 'budget'?"),
        ("period: 50ms\n    deadline", "perod: 50ms\n    deadline", 5, "did you mean 'period'?"),
        ("budget: 200MB", "budget: -3", 1, "budget"),
        ("budget: 200MB", "budget: lots", 1, "'lots' is not a byte size"),
        ("period: 50ms\n    dead", "period: 0ms\n    dead", 5, "must be more than zero"),
        ("period: 50ms\n    dead", "period: -50ms\n    dead", 5, "'-50ms' is not a duration"),
        ("deadline: 40ms", "deadline: 60ms", 4, "deadlines up to the period are supported"),
        ("name: client", "name: camera", 1, "two tasks are named 'camera'"),
        ("guarantee: best-effort", "guarantee: perhaps", 14, "'guaranteed' or 'best-effort'"),
        ("share: 0.85", "share: 1.5", 2, "supply.share"),
        ("{compute: 4ms}", "{compute: 0ms}", 15, "must load or compute for some time"),
        ("{compute: 4ms}", "{compute: 4ms, colour: red}", 15, "unknown field; allowed here: bytes, compute, load"),
        ("contract: {burst: 3, period: 50ms}", "contract: {burst: 0, period: 50ms}", 12, "contract.burst"),
        ("    blocks: [{compute: 4ms}]\n", "", 11, "either model or blocks"),
        ("name: camera", "name: ''", 4, "name"),
        ("period: 50ms\n    dead", "period: 1ns\n    dead", 5, "shorter than a microsecond"),
        ("period: 50ms\n    dead", "period: 999999999999h\n    dead", 5, "longer than a year"),
        ("share: 0.85", "share: 1e-6", 2, "supply.share"),
        ("burst: 3", "burst: 1000000000000", 12, "contract.burst"),
        ("bytes: 20MB", "bytes: -1", 9, "a size cannot be negative"),
        ("blocks: [{compute: 4ms}]", "blocks: []", 15, "must have at least one entry"),
        ("blocks: [{compute: 4ms}]", "blocks: 5", 15, "must be a list"),
        ("- name: client", "- name: client\n    name: other", 12, "'name' is given twice"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_allowed(old: str, new: str, line: int, said: str) -> None:
    assert old in RIGHT
    with pytest.raises(TaskSpecError) as error:
        parse_tasks(RIGHT.replace(old, new), "my.yaml")
    assert any(m.startswith(f"my.yaml:{line}: ") and said in m for m in str(error.value).splitlines()), error.value


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(TaskSpecError) as error:
        parse_tasks(RIGHT.replace("period: 50ms\n    dead", "period: x\n    dead").replace("burst: 3", "burst: x"))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "budget: [", "a: &x\n  b: *y\n", "\x00", "!!python/object:os.system x"]
)
def test_what_is_no_description_is_refused(text: str) -> None:
    with pytest.raises(TaskSpecError):
        parse_tasks(text)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.yaml").write_bytes(b"#" * (5 << 20))
    for name in ("binary.yaml", "large.yaml", "missing.yaml", "."):
        with pytest.raises(TaskSpecError):
            load_tasks(tmp_path / name)


def test_the_schema_knows_every_field_and_allows_no_other() -> None:
    schema: dict[str, Any] = json_schema()
    assert schema["additionalProperties"] is False
    assert set(yaml.safe_load(RIGHT)) <= set(schema["properties"])
    task = schema["$defs"]["TaskSpec"]
    assert {"name", "period", "deadline", "blocks", "contract", "guarantee", "overrun"} <= set(task["properties"])
