"""The pure parts of ``benchmarks/gpu.py``: batch sizes, bounds, checks, the results file, and its tables."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuda_kit.batches import hidden, next_batch, telling
from cuda_kit.bounds import best_peer, best_rate, bound, cells
from cuda_kit.campaign import Campaign
from cuda_kit.checks import check
from cuda_kit.children import Children, Outcome, state_of
from cuda_kit.derive import derive
from cuda_kit.effort import FULL, QUICK, SMALL
from cuda_kit.models import specs, tensor_shapes
from cuda_kit.report import markdown
from cuda_kit.results import Results
from cuda_kit.subjects import PEERS
from cuda_kit.tasks import describe, periods_of
from narrowboat.errors import BudgetError
from narrowboat.tasks.spec.load import load_tasks

MIB = 1 << 20
INTO = 100.0 * MIB  # bytes per second


def batch(size: int, seconds: float, **more: Any) -> dict[str, Any]:
    told = {"batch": size, "status": "ok", "detail": "", "median_s": seconds, "digests": ["same"], "difference": None}
    return {**told, "peak_bytes": None, "outside_bytes": 0, "reserved_bytes": None, **more}


def ours(size: int, seconds: float, copied: int, **more: Any) -> dict[str, Any]:
    stats = {"fixed_bytes": 10 * MIB, "peak_bytes": 45 * MIB, "predicted_latency_ms": seconds * 1e3}
    told = {"copied_bytes": copied, "read_bytes": 0, "given_bytes": 50 * MIB, "fixed_at_first_bytes": 10 * MIB}
    return batch(size, seconds, stats=stats, least_bytes=20 * MIB, smallest=False, **{**told, **more})


def record(subject: str, *batches: dict[str, Any], kind: str = "peer", divisor: float | None = None) -> dict[str, Any]:
    told = {"part": "vit", "subject": subject, "kind": kind, "divisor": divisor, "status": "ok", "detail": ""}
    return {**told, "weight_bytes": 100 * MIB, "batches": list(batches)}


def records(*batches: dict[str, Any], peer: float = 1.5, resident: float = 0.5) -> dict[str, Any]:
    """Resident takes ``resident`` seconds; copying 60 of 100 MiB takes 0.6."""
    plain = [batch(b["batch"], resident, peak_bytes=130 * MIB, reserved_bytes=110 * MIB) for b in batches]
    return {
        "copies": {"status": "ok", "in": {"1": INTO / 2, "2": INTO}, "out": {"1": INTO}},
        "vit/resident/r0": record("resident", *plain, kind="resident"),
        "vit/narrowboat-host@2.5/r0": record("narrowboat", *batches, kind="host", divisor=2.5),
        "vit/accelerate": record("accelerate", batch(1, 2 * peer, difference=0.0)),
        "vit/diffusers_leaf": record("diffusers_leaf", batch(1, peer)),
    }


def named(checks: list[dict[str, Any]], words: str) -> dict[str, Any]:
    (found,) = [each for each in checks if words in each["name"]]
    return found


# -- batch sizes ---------------------------------------------------------------------------------------


@given(st.floats(1e-4, 10), st.floats(1e-4, 10), st.integers(1, 1024))
def test_batch_sizes_double_until_computing_clearly_hides_the_copies(per: float, copying: float, most: int) -> None:
    done: dict[int, float] = {}
    while (size := next_batch(done, copying, most)) is not None:
        assert size == (2 * max(done) if done else 1)
        done[size] = size * per
    last = max(done)
    assert done[last] >= 1.25 * copying or 2 * last > most
    assert all(seconds < 1.25 * copying for size, seconds in done.items() if size < last)


def test_the_telling_batch_sizes_are_the_ends_and_those_of_like_size() -> None:
    seconds = {1: 0.1, 2: 0.2, 4: 0.4, 8: 0.8, 16: 1.6}
    assert telling(seconds, [0.38, 0.7]) == [1, 4, 8, 16]
    assert telling(seconds, [0.0]) == [1, 16]
    assert telling({}, [0.5]) == []


def test_hidden_is_within_a_tenth_of_resident() -> None:
    assert hidden(1.09, 1.0) and not hidden(1.11, 1.0) and not hidden(0.1, None)


# -- bounds --------------------------------------------------------------------------------------------


def test_a_pass_takes_as_long_as_computing_and_as_copying() -> None:
    assert bound(2.0, 100.0, 100.0) == 2.0
    assert bound(0.5, 100.0, 100.0) == 1.0
    assert bound(None, 100.0, 100.0) == 1.0
    assert best_rate({"1": 3.0, "2": 4.0}) == 4.0


def test_a_cell_has_both_bounds_and_the_best_of_the_others() -> None:
    (cell,) = cells(list(records(ours(1, 0.8, 70 * MIB)).values()), "vit", INTO, None)
    assert cell["must_copy_bytes"] == 60 * MIB
    assert cell["bound_s"] == pytest.approx(0.7)
    assert cell["least_s"] == pytest.approx(0.6)
    assert cell["bound_ratio"] == pytest.approx(8 / 7)
    assert cell["ratio"] == pytest.approx(1.6)
    assert cell["copies_over_computing"] == pytest.approx(1.4)
    assert cell["exact"] is True
    assert cell["libraries_bytes"] == 20 * MIB
    assert best_peer(cell) == ("diffusers_leaf", 1.5)


def test_other_bits_are_seen_and_a_failure_is_kept() -> None:
    found = cells(list(records(ours(1, 0.8, 1, digests=["other"])).values()), "vit", INTO, None)
    assert found[0]["exact"] is False
    failed = {"batch": 1, "status": "oom", "detail": "too little"}
    plain = records(ours(2, 0.8, 1))
    plain["vit/narrowboat-host@2.5/r0"]["batches"].append(failed)
    by_batch = {cell["batch"]: cell for cell in cells(list(plain.values()), "vit", INTO, None)}
    assert by_batch[1]["seconds"] is None and by_batch[1]["status"] == "oom"
    assert by_batch[2]["seconds"] == 0.8


def test_storage_bounds_what_comes_from_storage() -> None:
    told = records(ours(1, 3.0, 60 * MIB))
    stored = record("narrowboat", ours(1, 3.0, 60 * MIB, read_bytes=50 * MIB), kind="storage", divisor=2.5)
    found = cells([*told.values(), stored], "vit", INTO, 20.0 * MIB)
    assert [cell["bound_s"] for cell in found] == pytest.approx([0.6, 2.5])


# -- checks --------------------------------------------------------------------------------------------


def checks_of(told: dict[str, Any], parts: tuple[str, ...] = ("vit",), *, cuda: bool = True) -> list[dict[str, Any]]:
    return check(derive(told, is_cuda=cuda), told, list(parts), judge_times=cuda)


def test_latency_bits_memory_and_peers_are_checked() -> None:
    found = checks_of(records(ours(1, 0.73, 70 * MIB, peak_bytes=69 * MIB), peer=1.2))
    assert [each["name"] for each in found if not each["pass"]] == [named(found, "copies are hidden")["name"]]
    slow = checks_of(records(ours(1, 0.9, 70 * MIB, peak_bytes=71 * MIB), peer=1.2))
    assert not named(slow, "over the bound")["pass"]
    assert not named(slow, "within the budget")["pass"]
    assert not named(slow, "times as fast as diffusers_leaf")["pass"]


def test_peers_are_compared_where_copies_and_computing_are_of_like_size() -> None:
    found = checks_of(records(ours(1, 10.0, 60 * MIB), resident=9.0))
    assert not [each for each in found if "times as fast" in each["name"]]


def test_what_is_lacking_fails_loudly() -> None:
    told = records(ours(1, 0.7, 70 * MIB))
    told["vit/flextensor"] = {**record("flextensor"), "status": "not run", "detail": "no time was left"}
    told["tasks/run"] = {"part": "tasks", "status": "not available", "detail": "no device"}
    found = checks_of(told, ("vit", "swap", "tasks", "training", "decoder"))
    for words in ("swap: measured", "tasks on the device", "the plain step", "decoder: measured", "everything"):
        assert named(found, words)["pass"] is False
    assert "not available" in named(found, "tasks on the device")["value"]


def test_times_are_not_judged_on_an_emulated_device() -> None:
    found = checks_of(records(ours(1, 9.0, 70 * MIB, digests=["other"])), cuda=False)
    assert named(found, "over the bound")["pass"] is None
    assert named(found, "bits")["pass"] is False


def swapped(share: float, *, exact: bool = True) -> dict[str, Any]:
    names = ("evict", "evict_call", "restore", "evict_part", "restore_part")
    chunk = {"chunk": 2 * MIB, "bytes": 64 * MIB, "rates": dict.fromkeys(names, share * INTO)}
    chunk |= {"bytes_same": True, "free_exact": exact}
    copies = {"in": {"1": INTO}, "out": {"1": INTO}}
    return {"part": "swap", "status": "ok", "detail": "", "chunks": [chunk], "copies": copies, "graph": None}


def test_a_swap_is_judged_by_its_share_of_the_bandwidth() -> None:
    found = checks_of({"swap": swapped(0.95)}, ("swap",))
    assert named(found, "back in")["pass"] and named(found, "to the byte")["pass"]
    assert not named(found, "captured graph")["pass"]  # it was not captured
    found = checks_of({"swap": swapped(0.85, exact=False)}, ("swap",))
    assert not named(found, "back in")["pass"] and not named(found, "to the byte")["pass"]


def trained(**more: Any) -> dict[str, Any]:
    told = {"part": "training", "subject": "plain", "status": "ok", "detail": "", "step_s": 1.0, "same_bits": True}
    return {**told, "difference": 0.0, "allocated_bytes": 100 * MIB, "static_bytes": 20 * MIB, "shape": {}, **more}


def test_training_is_held_to_its_budget_and_plains_gradients() -> None:
    told = {
        "training/plain": trained(same_bits=None, difference=None),
        "training/plain-again": trained(difference=1e-7, same_bits=False),
        "training/recompute": trained(subject="recompute", step_s=1.3, allocated_bytes=62 * MIB),
        "training/narrowboat@50%": trained(
            subject="narrowboat", share=0.5, budget_bytes=60 * MIB, allocated_bytes=59 * MIB, step_s=1.2
        ),
    }
    assert all(each["pass"] for each in checks_of(told, ("training",)))
    told["training/narrowboat@50%"] |= {
        "allocated_bytes": 61 * MIB,
        "difference": 0.1,
        "same_bits": False,
        "step_s": 1.4,
    }
    found = checks_of(told, ("training",))
    assert [each["pass"] for each in found] == [False, False, False, True]


# -- the file, children, tables --------------------------------------------------------------------------


def test_results_are_whole_and_a_later_run_goes_on(tmp_path: Path) -> None:
    first = Results(tmp_path / "a.json", "first")
    first.put("vit/x", {"status": "ok", "detail": ""})
    first.put("vit/y", {"status": "timeout", "detail": ""})
    first.put("vit/z", {"status": "oom", "detail": ""})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    later = Results(tmp_path / "b.json", "second", tmp_path / "a.json")
    assert later.has("vit/x") and later.has("vit/z") and not later.has("vit/y")
    assert later.get("vit/z") is None
    later.forget(["vit/x"])
    assert not later.has("vit/x")
    later.put("vit/x", {"status": "ok", "detail": ""})
    assert later.records["vit/x"]["command"] == "second" and later.records["vit/z"]["command"] == "first"
    assert [run["command"] for run in json.loads((tmp_path / "b.json").read_text())["runs"]] == ["first", "second"]


def good(emit: Any, *, value: int) -> None:
    emit("first", value=value)
    time.sleep(0.05)
    emit("second", value=value + 1)


def refused(emit: Any) -> None:
    emit("first")
    raise BudgetError("too small\nby far", minimum=7, limiter="x")


def slow(emit: Any) -> None:
    emit("first")
    time.sleep(60)


def killed(emit: Any) -> None:
    os.kill(os.getpid(), 9)


def test_children_tell_how_they_ended_and_their_memory_is_seen_from_outside(tmp_path: Path) -> None:
    readings = iter(range(100, 100_000, 10))
    children = Children(tmp_path / "logs", lambda: next(readings))
    outcome = children.run("a/b", f"{__name__}:good", {"value": 3}, timeout=20)
    assert (outcome.status, [event["value"] for event in outcome.events]) == ("ok", [3, 4])
    first, second = (event["at"] for event in outcome.events)
    assert outcome.before == 100 and outcome.samples
    assert 0 < (outcome.peak(first, second) or 0) <= (outcome.peak() or 0)
    outcome = children.run("a/c", f"{__name__}:refused", {}, timeout=20)
    assert (outcome.status, outcome.detail) == ("refused", "BudgetError: too small by far")
    assert outcome.event("error") is not None and outcome.event("first") is not None
    assert children.run("a/d", f"{__name__}:killed", {}, timeout=20).status == "error"
    outcome = children.run("a/e", f"{__name__}:slow", {}, timeout=0.5)
    assert outcome.status == "timeout" and outcome.event("first") is not None and outcome.seconds < 20


def test_nobody_looks_where_nobody_can() -> None:
    assert Outcome().peak() is None
    assert state_of(RuntimeError("CUDA out of memory.")) == "oom"
    assert state_of(ModuleNotFoundError("x")) == "not installed"
    assert state_of(ValueError("x")) == "error"


def test_no_child_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    results = Results(tmp_path / "a.json", "command")
    children = Children(tmp_path / "logs", lambda: None)
    told: list[str] = []
    campaign = Campaign("emulated:1MiB", True, SMALL, tmp_path, tmp_path, results, children, told.append, 0.0)
    late = campaign.measure("x", f"{__name__}:good", dict, lambda outcome: {}, timeout=5)
    assert late["status"] == "not run" and not results.has("x")
    campaign.ends = time.monotonic() + 60
    made = campaign.measure("x", f"{__name__}:good", lambda: {"value": 1}, lambda o: {"n": len(o.events)}, timeout=5)
    assert (made["status"], made["n"]) == ("ok", 2)
    assert campaign.measure("x", "nobody:asks", dict, lambda outcome: {}, timeout=5) == made


def test_tables_hold_what_was_found() -> None:
    told = records(ours(1, 0.8, 70 * MIB), ours(2, 0.9, 70 * MIB))
    told["vit/flextensor@2"] = record("flextensor", divisor=2) | {"status": "not installed", "detail": "No module"}
    told["vit/narrowboat-unified"] = record("narrowboat", ours(1, 4.0, 0), kind="unified")
    told["swap"] = swapped(0.95)
    told["training/plain"] = trained(same_bits=None, difference=None)
    told["tasks/run"] = {"part": "tasks", "status": "not available", "detail": "tasks.yaml has no device"}
    data = {"machine": {"device": "cuda:0 (H)"}, "runs": [{"command": "python x", "began": "now"}], "records": told}
    data["derived"] = derive(told, is_cuda=True)
    data["checks"] = checks_of(told, ("vit", "swap", "tasks", "training"))
    page = markdown(data)
    for words in ("cuda:0 (H)", "`python x`", "flextensor at 1/2: not installed", "| 2.00 MiB |", "**FAIL**"):
        assert words in page, words
    assert "Unified memory forced, batch 1: 4 s" in page
    assert "tasks.yaml has no device" in page
    assert json.loads(json.dumps(data)) == data


# -- what is measured ------------------------------------------------------------------------------------


def test_the_models_are_what_they_are_said_to_be() -> None:
    sizes = {}
    for name, spec in specs(small=False).items():
        sizes[name] = sum(tensor.numel() for tensor in tensor_shapes(spec).values())
    assert sizes["vit"] == pytest.approx(304e6, rel=0.01)
    assert sizes["decoder"] == pytest.approx(8.03e9, rel=0.01)


def test_every_peer_that_is_asked_for_is_known() -> None:
    for effort in (FULL, QUICK, SMALL):
        assert set(effort.vit.peers) | set(effort.decoder.peers) <= set(PEERS)
        assert all(effort.swap_bytes % chunk == 0 for chunk in effort.swap_chunks)


def test_periods_give_every_network_the_same_share() -> None:
    alone = {"a": 0.1, "b": 0.3}
    assert periods_of({"a": 100, "b": 300}, alone, 1000.0) == {"a": 1.0, "b": 3.0}
    assert periods_of({"a": 100, "b": 300}, alone, 1000.0, 2) == {"a": 2.0, "b": 6.0}


def test_the_tasks_that_are_described_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(describe("cuda", 500 * MIB, {"resnet50": 98 * MIB}, {"resnet50": 0.5}, 2))
    told = load_tasks(file)
    assert (told.device, told.budget, told.tasks[0].step) == ("cuda", 500 * MIB, 500_000)
