"""The part about tasks: four networks whose weights are 1.96 times the device's limit, with deadlines, for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cuda_kit.campaign import Campaign, PartFailedError, Record
from cuda_kit.children import Outcome
from cuda_kit.commands import Said, narrowboat
from narrowboat.tasks.spec.schema import TasksSpec

DEMAND = 1.96  # the weights' bytes over the device's limit
_UTILISATION = 0.4  # of the device by computing and copying in, all tasks together
_HOST = 1.1  # times all weights, and
_HOST_BESIDE = 128 << 20  # bytes for buffers
_ROUND = 1 << 20
_NEW_LIMIT = 1.02  # times what is said to be needed, where the limit of weights alone holds no passes
_MOST_STRETCHED = 4  # times the periods that were thought of first
_PREPARING, _CHECKING = 240.0, 300.0


def run(campaign: Campaign) -> None:
    """Admission, a run and its conformance.

    Raises:
        PartFailedError: the weights cannot be made, or nobody knows how fast copies are.
    """
    if campaign.results.has("tasks/run"):
        return
    if campaign.left() <= 0:
        campaign.results.put("tasks/run", {"part": "tasks", "status": "not run", "detail": "no time was left"})
        return
    lacking = [name for name in ("device", "host_budget") if name not in TasksSpec.model_fields]
    if lacking:
        detail = f"tasks.yaml has no {' and no '.join(lacking)}: tasks run on the processor only"
        campaign.results.put("tasks/run", {"part": "tasks", "status": "not available", "detail": detail})
        campaign.say(f"tasks: {detail}")
        return
    folder = campaign.work / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    names = list(campaign.effort.task_models)
    if not all((folder / f"{name}.packed.safetensors").exists() for name in names):
        campaign.results.forget(["tasks/"])  # another machine's
    weights = _child(campaign, "write", {"names": names, "folder": str(folder)}, "weights", "bytes")
    told = {"names": names, "folder": str(folder), "device": campaign.device}
    seconds = _child(campaign, "alone", told, "alone", "seconds")
    asked = int(sum(weights.values()) / DEMAND) // _ROUND * _ROUND
    record: Record = {"part": "tasks", "status": "ok", "detail": "", "weights_bytes": weights, "alone_s": seconds}
    record |= {"demand": DEMAND, "asked_budget_bytes": asked, "checks": []}
    limit, stretch = asked, 1
    while True:
        file = folder / "tasks.yaml"
        periods = periods_of(weights, seconds, campaign.rate("in"), stretch)
        description = describe(campaign.device, limit, weights, periods, campaign.effort.calibration)
        file.write_text(description, encoding="utf-8")
        checked = narrowboat("tasks", "check", str(file), "--json", timeout=campaign.cap(_CHECKING))
        record["checks"].append(_said(checked))
        memory = (checked.document or {}).get("memory", {})
        if checked.code == 1 and memory.get("needed_bytes", 0) > limit and limit == asked:
            # The limit was told by weights alone; passes take something beside them.
            limit = int(memory["needed_bytes"] * _NEW_LIMIT) // _ROUND * _ROUND + _ROUND
        elif checked.code == 1 and checked.document is not None and stretch < _MOST_STRETCHED:
            stretch *= 2  # measured with margins, a pass takes longer than its median alone
        else:
            break
    record |= {"budget_bytes": limit, "periods_s": periods, "stretched": stretch, "description": description}
    record |= _run(campaign, folder, file, admitted=checked.code == 0)
    campaign.say(f"tasks: {record['status']} {record['detail']}")
    campaign.results.put("tasks/run", record)


def periods_of(weights: dict[str, int], alone: dict[str, float], into: float, stretch: int = 1) -> dict[str, float]:
    """A period for each network, so that all together use a given share of the device if weights come in each time.

    Args:
        weights: bytes.
        alone: seconds of a pass.
        into: bytes per second from pinned memory to the device.
        stretch: times as long.
    """
    share = _UTILISATION / len(weights)
    return {name: round(stretch * (alone[name] + n / into) / share, 4) for name, n in weights.items()}


def _child(campaign: Campaign, call: str, arguments: dict[str, Any], event: str, value: str) -> dict[str, Any]:
    def told(outcome: Outcome) -> Record:
        found = outcome.event(event)
        return {value: found[value]} if found else {}

    key = f"tasks/{event}"
    record = campaign.measure(
        key, f"cuda_kit.tasks_child:{call}", lambda: arguments, told, timeout=_PREPARING, about={"part": "tasks"}
    )
    if record["status"] != "ok":
        raise PartFailedError(f"{key}: {record['status']} {record['detail']}")
    found: dict[str, Any] = record[value]
    return found


def describe(device: str, limit: int, weights: dict[str, int], periods: dict[str, float], calibration: float) -> str:
    """The text of tasks.yaml."""
    host = int(sum(weights.values()) * _HOST) + _HOST_BESIDE
    tasks = [
        {"name": n, "model": f"zoo:{n}", "weights": f"{n}.packed.safetensors", "period": f"{period * 1e6:.0f}us"}
        for n, period in periods.items()
    ]
    told = {"device": device, "budget": limit, "host_budget": host, "margin": 1.5}
    told |= {"supply": {"share": 0.9, "delay": "10ms"}, "calibration": f"{calibration:g}s"}
    return str(yaml.safe_dump({**told, "tasks": tasks}, sort_keys=False))


def _run(campaign: Campaign, folder: Path, file: Path, *, admitted: bool) -> Record:
    """Run it, by force where it is not admitted: what happens then is worth knowing too."""
    seconds, trace = campaign.effort.task_seconds, folder / "trace.json"
    trace.unlink(missing_ok=True)
    force = [] if admitted else ["--force"]
    arguments = ["tasks", "run", str(file), "--seconds", f"{seconds:g}", "--trace", str(trace), "--json", *force]
    ran = narrowboat(*arguments, timeout=campaign.cap(seconds + _CHECKING))
    record: Record = {"admitted": admitted, "run": _said(ran)}
    if ran.document is None or not trace.exists():
        return record | {"status": "error", "detail": ran.text[-200:] or f"ended with {ran.code}"}
    conformed = narrowboat("tasks", "conform", str(trace), "--json", timeout=_CHECKING)
    return record | {"conform": _said(conformed)}


def _said(said: Said) -> Record:
    return {
        "command": said.command,
        "code": said.code,
        "seconds": round(said.seconds, 1),
        "text": said.text,
        "document": said.document,
    }
