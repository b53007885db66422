"""Which device is meant, and what is told where none is."""

from __future__ import annotations

import json

import pytest

from narrowboat.errors import TaskSpecError
from narrowboat.machine.device_name import DeviceChoice, parse_device
from narrowboat.tasks.spec.load import parse_tasks, tasks_from
from narrowboat.tasks.spec.schema import json_schema

TEXT = """\
device: cuda:1
budget: 6GiB
host_budget: 8GiB
chunk: 32MiB
tasks:
  - {name: t, model: "zoo:resnet18", weights: r.safetensors, period: 50ms}
"""


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("cpu", DeviceChoice("cpu")),
        ("cuda", DeviceChoice("cuda")),
        (" cuda:3 ", DeviceChoice("cuda", 3)),
        ("emulated:64MiB", DeviceChoice("emulated", None, 64 << 20)),
        ("emulated:64MiB:200MB", DeviceChoice("emulated", None, 64 << 20, 200_000_000)),
        ("emulated:64MiB:200MB:64KiB", DeviceChoice("emulated", None, 64 << 20, 200_000_000, 64 << 10)),
    ],
)
def test_names_of_devices(text: str, meant: DeviceChoice) -> None:
    assert parse_device(text) == meant


@pytest.mark.parametrize(
    "text",
    [
        *("", "gpu", "mps", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "emulated", "emulated:", "emulated:x"),
        *("emulated:1MiB:2MB:3000", "emulated:1MiB:2MB:4KiB:5"),
    ],
)
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no device|is no emulated device|whole pages"):
        parse_device(text)


def test_a_description_says_where_its_tasks_run() -> None:
    told = parse_tasks(TEXT)
    assert (told.device, told.budget, told.host_budget, told.chunk) == ("cuda:1", 6 << 30, 8 << 30, 32 << 20)
    assert tasks_from(json.loads(json.dumps(told.plain()))) == told
    bare = parse_tasks("\n".join(line for line in TEXT.splitlines() if not line.startswith(("device", "host", "chu"))))
    assert (bare.device, bare.host_budget, bare.chunk) == ("cpu", None, None)


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("device: cuda:1", "device: gpu", 1, "device: 'gpu' is no device: use cpu, cuda or cuda:N"),
        ("device: cuda:1", "device: 1", 1, "device: 1 is no device"),
        ("device: cuda:1", "devise: cuda:1", 1, "did you mean 'device'?"),
        ("host_budget: 8GiB", "host_budget: much", 3, "host_budget: 'much' is not a byte size"),
        ("host_budget: 8GiB", "hostbudget: 8GiB", 3, "did you mean 'host_budget'?"),
        ("chunk: 32MiB", "chunk: 0", 1, "chunk must be more than zero"),
        ("device: cuda:1", "device: cpu", 1, "host_budget belongs to a device with memory of its own"),
        ("device: cuda:1\nbudget: 6GiB\nhost_budget: 8GiB", "budget: 6GiB", 1, "chunk belongs to a device"),
    ],
)
def test_errors_name_line_and_field(old: str, new: str, line: int, said: str) -> None:
    assert old in TEXT
    with pytest.raises(TaskSpecError) as error:
        parse_tasks(TEXT.replace(old, new), "tasks.yaml")
    assert f"tasks.yaml:{line}: " in str(error.value) and said in str(error.value)


def test_the_schema_tells_of_them() -> None:
    fields = json_schema()["properties"]
    assert "cuda:N" in fields["device"]["description"]
    assert "pinned host memory" in fields["host_budget"]["description"]
    assert "the device's own" in fields["chunk"]["description"]
