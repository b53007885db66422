"""The part about swapping: one child, and what is made of it."""

from __future__ import annotations

from cuda_kit.campaign import Campaign, Record
from cuda_kit.children import Outcome

_TIMEOUT = 180.0


def run(campaign: Campaign) -> None:
    """A task's memory, out and in."""
    effort = campaign.effort
    campaign.measure(
        "swap",
        "cuda_kit.swap_child:run",
        lambda: {
            "device": campaign.device,
            "nbytes": effort.swap_bytes,
            "chunks": list(effort.swap_chunks),
            "repeats": effort.swap_repeats,
            "sizes": list(effort.copy_bytes),
            "copies": effort.copies,
        },
        _told,
        timeout=_TIMEOUT,
        about={"part": "swap"},
    )


def _told(outcome: Outcome) -> Record:
    chunks = [_bare(event) for event in outcome.events if event["event"] == "chunk"]
    copies, graph = outcome.event("copies"), outcome.event("graph")
    return {
        "chunks": chunks,
        "copies": _bare(copies) if copies else None,
        "graph": _bare(graph) if graph else None,
    }


def _bare(event: Record) -> Record:
    return {key: value for key, value in event.items() if key not in ("event", "at")}
