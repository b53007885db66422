"""What the benchmark must show, each as a check with its value and its target. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cuda_kit.batches import HIDDEN
from cuda_kit.bounds import LIKE_SIZE, best_peer
from narrowboat.quantities import format_bytes

NEAR_BOUND = 1.05
NEAR_STORAGE = 1.10
AHEAD = 1.5
SWAP_SHARE = 0.9
DEMAND = 1.96
DRIFT = 0.05
ROUNDING = 1e-5  # of gradients, where kernels give the same bits every time

Check = dict[str, Any]
Records = dict[str, dict[str, Any]]


def check(derived: dict[str, Any], records: Records, parts: list[str], *, judge_times: bool) -> list[Check]:
    """Every check of the parts that were asked for: ``name``, ``value``, ``target``, ``pass``.

    Args:
        derived: by ``derive``.
        records: by key.
        parts: that were asked for.
        judge_times: ``pass`` is None for those about times if not, as on an emulated device.
    """
    found: list[Check] = []
    for cell in derived.get("cells", []):
        found += _cell(cell)
    if "swap" in parts:
        found += _swap(derived.get("swap"), records.get("swap"))
    if "tasks" in parts:
        found += _tasks(records)
    if "training" in parts:
        found += _training(records)
    for part in ("vit", "decoder"):
        if part in parts:
            found += _hidden(derived, part)
            found += _resident(derived, part)
    lacking = [key for key, record in records.items() if record["status"] in ("not run", "timeout")]
    found.append(_check("everything that was asked for was run", ", ".join(lacking) or "all", "all", not lacking))
    if not judge_times:
        found = [{**each, "pass": None} if each["timed"] and each["value"] is not None else each for each in found]
    return [{key: value for key, value in each.items() if key != "timed"} for each in found]


def _check(name: str, value: Any, target: Any, passed: bool, *, timed: bool = False) -> Check:
    return {"name": name, "value": value, "target": target, "pass": bool(passed), "timed": timed}


def _at_most(name: str, value: float | None, target: float) -> Check:
    shown = round(value, 4) if value is not None else None
    return _check(name, shown, f"<= {target:g}", value is not None and value <= target, timed=True)


def _at_least(name: str, value: float | None, target: float) -> Check:
    shown = round(value, 4) if value is not None else None
    return _check(name, shown, f">= {target:g}", value is not None and value >= target, timed=True)


def where(cell: dict[str, Any]) -> str:
    """A cell in words."""
    budget = f", weights in 1/{cell['divisor']:g}" if cell["divisor"] else ""
    kinds = {"host": "", "storage": ", from storage", "unified": ", unified memory forced"}
    return f"{cell['model']}{budget}{kinds[cell['kind']]}, batch {cell['batch']}"


def _cell(cell: dict[str, Any]) -> Iterator[Check]:
    place = where(cell)
    if cell["seconds"] is None:
        yield _check(f"{place}: narrowboat runs", f"{cell['status']}: {cell['detail']}", "ok", False)
        return
    yield _check(f"{place}: resident's bits", cell["exact"], True, cell["exact"] is True)
    if cell["kind"] == "unified":
        return
    bound = NEAR_BOUND if cell["kind"] == "host" else NEAR_STORAGE
    yield _at_most(f"{place}: latency over the bound", cell["bound_ratio"], bound)
    peak, budget = cell["own_peak_bytes"], cell["budget_bytes"]
    if cell["peak_bytes"] is not None and cell["libraries_bytes"] is not None:
        peak = cell["peak_bytes"] - cell["libraries_bytes"]
    yield _check(
        f"{place}: device memory within the budget", format_bytes(peak), f"<= {format_bytes(budget)}", peak <= budget
    )
    best, copies = best_peer(cell), cell["copies_over_computing"]
    if cell["kind"] == "host" and best is not None and copies and LIKE_SIZE[0] <= copies <= LIKE_SIZE[1]:
        name = f"{place}: times as fast as {best[0]}, the best of the others"
        yield _at_least(name, best[1] / cell["seconds"], AHEAD)


def _hidden(derived: dict[str, Any], part: str) -> Iterator[Check]:
    """Up to some batch size computing gets so long that copies no longer show."""
    here = [c for c in derived.get("cells", []) if c["model"] == part and c["kind"] == "host" and c["ratio"]]
    for divisor in dict.fromkeys(cell["divisor"] for cell in here):
        best = min((cell for cell in here if cell["divisor"] == divisor), key=lambda cell: cell["ratio"])
        name = f"{part}, weights in 1/{divisor:g}, batch {best['batch']}: the copies are hidden, times resident"
        yield _at_most(name, best["ratio"], HIDDEN)


def _resident(derived: dict[str, Any], part: str) -> Iterator[Check]:
    if not any(cell["model"] == part for cell in derived.get("cells", [])):
        yield _check(f"{part}: measured", "no", "yes", False)
    drift = derived.get("drift", {}).get(part)
    if drift is not None:
        name = f"{part}: resident's latency at the end over that at the beginning"
        yield _check(name, round(drift, 3), f"1 +- {DRIFT:g}", abs(drift - 1) <= DRIFT, timed=True)


def _swap(derived: dict[str, Any] | None, record: dict[str, Any] | None) -> Iterator[Check]:
    if not derived or not derived["chunks"]:
        told = f"{record['status']}: {record['detail']}" if record else "not run"
        yield _check("swap: measured", told, "ok", False)
        return
    chunks = derived["chunks"]
    for way, words in (("evict", "out, until the memory is others'"), ("restore", "back in")):
        best = max(chunks, key=lambda chunk: chunk["share"][way])
        name = f"swap {words}: share of the pinned copies' bandwidth, chunks of {format_bytes(best['chunk'])}"
        yield _at_least(name, best["share"][way], SWAP_SHARE)
    same, exact = (all(chunk[name] for chunk in chunks) for name in ("bytes_same", "free_exact"))
    yield _check("swap: addresses and bytes unchanged, digests verified", same, True, same)
    yield _check("swap: the driver's free memory, to the byte", exact, True, exact)
    if derived["is_cuda"]:
        graph = derived["graph"]
        told = graph["same"] if graph else "not run"
        yield _check("swap: a captured graph replays right after it", told, True, bool(graph and graph["same"]))
    if record is not None and record["status"] != "ok":
        yield _check("swap: to the end", f"{record['status']}: {record['detail']}", "ok", False)


def _tasks(records: Records) -> Iterator[Check]:
    record = records.get("tasks/run")
    if record is None or record["status"] != "ok":
        failed = (r for k, r in records.items() if k.startswith("tasks/") and r["status"] != "ok")
        record = record or next(failed, None)
        told = f"{record['status']}: {record['detail']}" if record else "not run"
        yield _check("tasks on the device", told, "ok", False)
        return
    ratio = sum(record["weights_bytes"].values()) / record["budget_bytes"]
    yield _check("tasks: weights over the device's limit", round(ratio, 2), f">= {DEMAND}", ratio >= DEMAND - 0.005)
    yield _check("tasks: admitted", record["admitted"], True, record["admitted"])
    run, conform = (record.get(name, {}).get("document") or {} for name in ("run", "conform"))
    jobs = sum(task["jobs"] for task in run.get("tasks", []))
    missed = run.get("missed", conform.get("missed"))
    yield _check("tasks: deadlines missed", f"{missed} of {jobs}", "0 of some", missed == 0 and jobs > 0)
    yield _check("tasks: conform", conform.get("wording", "no verdict"), "valid", bool(conform.get("valid")))


def _training(records: Records) -> Iterator[Check]:
    plain = records.get("training/plain")
    if plain is None or plain["status"] != "ok":
        told = f"{plain['status']}: {plain['detail']}" if plain else "not run"
        yield _check("training: the plain step", told, "ok", False)
        return
    again, recompute = (records.get(f"training/{name}", {}) for name in ("plain-again", "recompute"))
    noise = max(again.get("difference") or 0.0, ROUNDING)
    ours = [r for r in records.values() if r.get("part") == "training" and r.get("subject") == "narrowboat"]
    if not ours:
        yield _check("training: narrowboat", "not run", "ok", False)
    for record in ours:
        place = f"training, {record['share']:.0%} of plain's activations"
        if record["status"] != "ok":
            yield _check(f"{place}: narrowboat runs", f"{record['status']}: {record['detail']}", "ok", False)
            continue
        peak = record.get("allocated_bytes", record.get("measured_peak_bytes", 0))
        budget = record["budget_bytes"]
        yield _check(
            f"{place}: allocator's peak within the budget",
            format_bytes(peak),
            f"<= {format_bytes(budget)}",
            peak <= budget,
        )
        far = record["difference"]
        same = "same bits" if record["same_bits"] else f"{far:.1e}" if far is not None else "not compared"
        passed = record["same_bits"] is True or (far is not None and far <= noise)
        yield _check(f"{place}: plain's gradients", same, f"same bits, or within {noise:.0e}", passed)
        taken = recompute.get("allocated_bytes")
        if recompute.get("status") == "ok" and taken is not None and taken >= peak:
            name = f"{place}: time over recompute in every block, which takes {format_bytes(taken)}"
            yield _at_most(name, record["step_s"] / recompute["step_s"], 1.0)
