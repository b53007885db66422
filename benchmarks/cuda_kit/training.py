"""The part about training: which child runs when, and the budgets that follow from what the plain step takes."""

from __future__ import annotations

from typing import Any

from cuda_kit.campaign import Campaign, PartFailedError, Record
from cuda_kit.children import Outcome

_CALLS = "cuda_kit.training_child"
_TIMEOUT = 240.0
_HOST = 1.5  # times plain's activations: pinned memory for those that leave
_LEAST_HOST = 64 << 20


def run(campaign: Campaign) -> None:
    """Plain twice, with recompute, and inside budgets.

    Raises:
        PartFailedError: what the plain step takes is not known.
    """
    campaign.work.mkdir(parents=True, exist_ok=True)
    reference = campaign.work / "gradients.pt"
    keys = [f"training/{name}" for name in ("plain", "plain-again", "recompute")]
    keys += [f"training/narrowboat@{share:.0%}" for share in campaign.effort.shares]
    if not all(campaign.results.has(key) for key in keys) and not reference.exists():
        campaign.results.forget(["training/"])  # there is nothing any more to compare gradients with
    if not campaign.results.has(keys[0]):
        reference.unlink(missing_ok=True)
    plain = _one(campaign, "plain", "plain", str(reference))
    if plain["status"] != "ok":
        raise PartFailedError(f"the plain step: {plain['status']} {plain['detail']}")
    if not campaign.is_cuda:
        plain = {**plain, **_foreseen(campaign)}
    activations = plain["allocated_bytes"] - plain["static_bytes"]
    _one(campaign, "plain-again", "plain", str(reference))
    _one(campaign, "recompute", "recompute", str(reference))
    for share in campaign.effort.shares:
        budget = int(plain["static_bytes"] + share * activations)
        about = {"share": share, "budget_bytes": budget, "plain_activation_bytes": activations}
        host = max(int(_HOST * activations), _LEAST_HOST)
        _one(campaign, f"narrowboat@{share:.0%}", "narrowboat", str(reference), about, budget, host)


def _one(
    campaign: Campaign,
    name: str,
    subject: str,
    reference: str,
    about: Record | None = None,
    budget: int | None = None,
    host: int = _LEAST_HOST,
) -> Record:
    return campaign.measure(
        f"training/{name}",
        f"{_CALLS}:run",
        lambda: {
            "device": campaign.device,
            "shape": campaign.effort.training,
            "subject": subject,
            "steps": campaign.effort.steps,
            "budget": budget,
            "host": host,
            "reference": reference,
        },
        _told,
        timeout=_TIMEOUT,
        about={"part": "training", "subject": subject, "shape": campaign.effort.training, **(about or {})},
    )


def _foreseen(campaign: Campaign) -> dict[str, Any]:
    """Bytes of the plain step as narrowboat's plan tells them, where no allocator does."""
    record = campaign.measure(
        "training/foreseen",
        f"{_CALLS}:foresee",
        lambda: {"device": campaign.device, "shape": campaign.effort.training, "host": _LEAST_HOST},
        lambda outcome: outcome.event("foreseen") or {},
        timeout=_TIMEOUT,
        about={"part": "training", "subject": "foreseen"},
    )
    if record["status"] != "ok":
        raise PartFailedError(f"what the plain step takes is not known: {record['status']} {record['detail']}")
    return {name: record[name] for name in ("allocated_bytes", "static_bytes")}


def _told(outcome: Outcome) -> Record:
    gradients, end = outcome.event("gradients"), outcome.event("end")
    steps = [event["seconds"] for event in outcome.events if event["event"] == "step"]
    found: Record = {"steps_s": steps, "step_s": sorted(steps)[len(steps) // 2] if steps else None}
    for event in (gradients, end):
        found |= {key: value for key, value in (event or {}).items() if key not in ("event", "at")}
    found["peak_bytes"] = outcome.peak()
    return found
