"""The budget holds, seen from outside: by the kernel's own limit, by the page cache, and over many passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from narrowboat.machine.cgroup import MemoryCgroup, writable_memory_cgroup
from narrowboat.machine.pagecache import cached_bytes, drop_cached
from narrowboat.zoo.save import save_random_weights

MIB = 1 << 20
REFUSAL = writable_memory_cgroup()
# One pass in plain PyTorch first, in a process of its own: its answer, and what a process holds before any weights.
PLAIN = """
import hashlib, json, sys, torch
from safetensors.torch import load_file
from narrowboat import zoo
torch.set_num_threads(1)
factory = zoo.get(sys.argv[1])
model = factory()
model.load_state_dict(load_file(sys.argv[2]), strict=False)  # a packed file has padding entries
with torch.inference_mode():
    answer = model(*factory.example_inputs())
print(hashlib.sha256(answer.numpy().tobytes()).hexdigest())
"""
STREAMED = """
import hashlib, json, sys, torch
import narrowboat as nb
from narrowboat import zoo
from narrowboat.machine.memory import process_memory
from narrowboat.machine.pagecache import cached_bytes
from narrowboat.profile.warmup import warm_up, warm_up_tracer
torch.set_num_threads(1)
name, path, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
factory = zoo.get(name)
import narrowboat.stream.api  # imported by the first nb.stream; code, and no weight
warm_up()
warm_up_tracer()
inputs = factory.example_inputs()
baseline = process_memory().rss
if budget == 0:
    print(json.dumps({"baseline": process_memory().hwm}))
    raise SystemExit
cached = cached_bytes(path)
model = nb.stream(factory, path, budget=budget, example=inputs)
answers = set()
with torch.inference_mode():
    for _ in range(2):
        answers.add(hashlib.sha256(model(*inputs).numpy().tobytes()).hexdigest())
stats = nb.session(model).stats()
print(json.dumps({
    "answers": sorted(answers),
    "over_baseline": process_memory().hwm - baseline,
    "cached": cached_bytes(path) - cached,
    "read": stats["bytes_read"],
    "resident": stats["resident_bytes"],
    "direct": stats["direct_io"],
    "policy": stats["allocator_policy"],
}))
"""
ENVIRONMENT = {**os.environ, "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}


def run(program: str, *arguments: object, group: MemoryCgroup | None = None) -> str:
    child = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=group.enter if group is not None else None,
    )
    assert child.returncode == 0, f"exit {child.returncode}\n{child.stderr[-2000:]}"
    return child.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import narrowboat as nb

    folder = tmp_path_factory.mktemp("resnet101")
    save_random_weights("resnet101", folder / "random.safetensors")
    nb.pack(folder / "random.safetensors", folder / "packed.safetensors")
    (folder / "random.safetensors").unlink()
    drop_cached(folder / "packed.safetensors")
    return folder / "packed.safetensors"


@pytest.mark.skipif(REFUSAL is not None, reason=f"no writable memory cgroup: {REFUSAL}")
def test_resnet101_answers_exactly_under_a_real_limit_of_less_than_half_its_weights(resnet: Path) -> None:
    weights = resnet.stat().st_size
    budget = int(weights / 2.32)
    baseline: int = json.loads(run(STREAMED, "resnet101", resnet, 0))["baseline"]
    # What a child holds beside its baseline: page tables, and code pages that it touches later.
    limit = baseline + budget + 16 * MIB
    with MemoryCgroup(limit) as group:
        told: dict[str, Any] = json.loads(run(STREAMED, "resnet101", resnet, budget, group=group))
        assert group.oom_kills() == 0
        assert (group.peak() or 0) <= limit
    assert told["answers"] == [run(PLAIN, "resnet101", resnet)]
    assert told["over_baseline"] <= budget
    assert told["resident"] < budget
    assert all(nbytes > 0 for nbytes in told["read"])
    if told["direct"]:
        assert told["cached"] < MIB


PASSES = """
import gc, json, sys, torch
import narrowboat as nb
from narrowboat.machine.memory import process_memory
from torch import nn
torch.set_num_threads(1)
path, passes = sys.argv[1], int(sys.argv[2])
def factory():
    return nn.Sequential(*[nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96)) for _ in range(4)])
from narrowboat.profile import workload
workload.TARGET, workload.SMALL = 1 << 15, 1 << 12
x = torch.ones(1, 96)
torch.manual_seed(0)
net = factory()
nb.pack(net.state_dict(), path)
try:
    nb.stream(factory, path, budget=1, example=(x,))
except nb.BudgetError as error:
    minimum = error.minimum
model = nb.stream(factory, path, budget=minimum, example=(x,))
session = nb.session(model)
with torch.inference_mode():
    want = net(x)
    for _ in range(passes // 4):
        model(x)
    gc.collect()
    before = process_memory().rss
    for _ in range(passes - passes // 4):
        exact = torch.equal(model(x), want)
        assert exact
stats = session.stats()
passes, streamed = stats["passes"], len(session.plan.streamed)
print(json.dumps({"grown": process_memory().rss - before, "passes": passes, "streamed": streamed}))
"""


def test_two_thousand_passes_take_no_more_memory(tmp_path: Path) -> None:
    told = json.loads(run(PASSES, tmp_path / "w.safetensors", 2000))
    assert told["passes"] == 2000
    assert told["streamed"] >= 4
    assert told["grown"] <= MIB


def test_buffered_reads_leave_the_page_cache_as_it_was(tmp_path: Path, deep: Any) -> None:
    path = deep.copy(tmp_path / "w.safetensors")
    drop_cached(path)
    model = deep.stream(path=path, io="buffered")
    assert deep.right(model, 3)
    assert cached_bytes(path) < MIB
