"""The nodes of a Ray cluster, as Ray tells them."""

from __future__ import annotations

from dataclasses import dataclass

from narrowboat.cluster.settings import MEMORY, NAME


@dataclass(frozen=True)
class Machine:
    """A node as the cluster's membership tells it.

    Attributes:
        identity: of this life of the node; one that comes back has another.
        name: for people.
        budget: bytes that it gives to narrowboat.
        address: of its host; nodes that share one share its cores and storage.
    """

    identity: str
    name: str
    budget: int
    address: str = ""


def living_machines() -> list[Machine]:
    """All nodes that live, with what they offer, which may be nothing; those of most memory first."""
    import ray

    found = []
    for node in ray.nodes():
        if not node.get("Alive"):
            continue
        identity, host = str(node["NodeID"]), str(node.get("NodeManagerHostname", ""))
        name = (node.get("Labels") or {}).get(NAME) or f"{host}-{identity[:6]}"
        budget = int(node.get("Resources", {}).get(MEMORY, 0))
        found.append(Machine(identity, str(name), budget, str(node.get("NodeManagerAddress", host))))
    return sorted(found, key=lambda machine: (-machine.budget, machine.name, machine.identity))
