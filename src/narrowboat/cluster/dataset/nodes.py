"""The nodes of the cluster, and which of them can work at a data set."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from narrowboat.cluster.dataset.job import Terms
from narrowboat.cluster.dataset.survey import Found, survey_remotely
from narrowboat.cluster.facts import differing, versions
from narrowboat.cluster.machines import Machine
from narrowboat.cluster.settings import MEMORY
from narrowboat.errors import NoClusterError, NodeVersionError, PlacementError, UsageError
from narrowboat.quantities import format_bytes

log = logging.getLogger("narrowboat")
_ANSWER = 300.0  # seconds for a node to answer the survey: it may have to import the libraries of a large model
_RELEASE = 10.0  # seconds that bytes may take to come back from a job that has just ended
TASK = "map"


def require_cluster() -> None:
    """Ray is installed, and this process is connected to a cluster.

    Raises:
        NoClusterError: it is not.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise NoClusterError(
            f"a data set over a cluster needs Ray Data ({error}): pip install 'narrowboat[ray]'"
        ) from None
    if not ray.is_initialized():
        raise NoClusterError("this process is connected to no Ray cluster: call ray.init(address='auto') first")


def free_bytes() -> dict[str, int]:
    """By identity of the node: the bytes that nobody has booked."""
    from ray._private.state import available_resources_per_node

    return {str(node): int(left.get(MEMORY, 0)) for node, left in available_resources_per_node().items()}


def chosen(nodes: int | Sequence[str] | None, known: Sequence[Machine]) -> list[Machine]:
    """Those of the known nodes that the caller means: all that offer memory, or those named by name or identity.

    Raises:
        NoClusterError: none offers any.
        UsageError: there is no such node.
    """
    if isinstance(nodes, bool) or (isinstance(nodes, int) and nodes < 1) or isinstance(nodes, str):
        raise UsageError(f"nodes is a number of nodes from 1, or a list of their names, not {nodes!r}")
    if nodes is None or isinstance(nodes, int):
        offering = [machine for machine in known if machine.budget > 0]
        if not offering:
            raise NoClusterError(
                f"no node of the Ray cluster offers {MEMORY}: start each with the bytes that it gives, as in "
                f"ray start --address=HEAD:6379 --resources='{{\"{MEMORY}\": 2147483648}}'"
            )
        return offering
    picked = []
    for name in nodes:
        match = [machine for machine in known if name == machine.name or machine.identity.startswith(name)]
        if len(match) != 1:
            raise UsageError(
                f"there is no node {name!r} in the cluster, which has {', '.join(m.name for m in known)}"
                if not match
                else f"{name!r} could be any of the nodes {', '.join(m.name for m in match)}: give the identity"
            )
        picked += match
    return list({machine.identity: machine for machine in picked}.values())


def room(machine: Machine, budget: int | None, free: int) -> tuple[int, str]:
    """What a worker would have on a node in bytes; and why it cannot have it, or ""."""
    wanted = machine.budget if budget is None else budget
    if machine.budget == 0:
        return wanted, f"it offers no {MEMORY}"
    if machine.budget < wanted:
        return wanted, f"it offers {format_bytes(machine.budget)}, and the budget is {format_bytes(wanted)}"
    if free < wanted:
        return wanted, f"of the {format_bytes(machine.budget)} that it offers {format_bytes(free)} are free"
    return wanted, ""


def _free_soon(machines_: Sequence[Machine], budget: int | None) -> dict[str, int]:
    """What is free on each node. What a job that has just ended had booked comes back after a moment."""
    deadline = time.monotonic() + _RELEASE
    while True:
        free = free_bytes()
        lacking = [
            m for m in machines_ if not room(m, budget, m.budget)[1] and room(m, budget, free.get(m.identity, 0))[1]
        ]
        if not lacking or time.monotonic() > deadline:
            return free
        time.sleep(0.2)


def look(machines_: Sequence[Machine], model: bytes, budget: int | None) -> tuple[dict[str, Found], dict[str, str]]:
    """Ask the nodes that have room: what they found, and the reasons of the others, by identity."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    free = _free_soon(machines_, budget)
    ask, asked, reasons = survey_remotely(), {}, {}
    for machine in machines_:
        wanted, why = room(machine, budget, free.get(machine.identity, 0))
        if why:
            reasons[machine.identity] = why
            continue
        here = NodeAffinitySchedulingStrategy(node_id=machine.identity, soft=False)
        asked[machine.identity] = ask.options(scheduling_strategy=here).remote(model, wanted)
    _, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER) if asked else ([], [])
    found: dict[str, Found] = {}
    for identity, reference in asked.items():
        if reference in late:
            ray.cancel(reference, force=True)
            reasons[identity] = f"it did not answer within {_ANSWER:g} s"
            continue
        try:
            found[identity] = ray.get(reference)
        except Exception as error:  # narrowboat is not there, or the node has died
            said = [line for line in str(error).splitlines() if line.strip()]
            reasons[identity] = f"it could not be asked: {said[-1].strip() if said else type(error).__name__}"
    return found, reasons


def agree(names: dict[str, str], found: dict[str, Found], *, same_bits: bool) -> Terms:
    """What all nodes have in common.

    Args:
        names: of the nodes, by identity.
        found: of those that answered.
        same_bits: whether the kernels must be the same too.

    Raises:
        NodeVersionError: versions are not those of this process, or weights or kernels are not the same everywhere.
    """
    here = versions()
    wrong = {identity: differing(here, dict(one.versions)) for identity, one in found.items()}
    if any(wrong.values()):
        told = "; ".join(f"{names[identity]} has {what}" for identity, what in wrong.items() if what)
        raise NodeVersionError(f"{told}: install the same versions, or leave those nodes out with nodes=")
    weights = _by(names, {identity: one.weights for identity, one in found.items() if one.weights})
    if len(weights) > 1:
        told = "; ".join(f"{value[:12]} on {', '.join(who)}" for value, who in weights.items())
        raise NodeVersionError(f"the weights are not the same on all nodes: {told}: copy one file to all")
    kinds = _by(names, {identity: one.instructions for identity, one in found.items() if not one.refusal})
    if same_bits and len(kinds) > 1:
        told = "; ".join(f"{kind} on {', '.join(who)}" for kind, who in kinds.items())
        raise NodeVersionError(
            f"the processors are not alike, and would give other bits: {told}: choose alike ones with nodes=, or "
            "allow it with same_bits=False"
        )
    return Terms(here, next(iter(weights), ""), next(iter(kinds), "") if same_bits else "")


def _by(names: dict[str, str], values: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for identity, value in values.items():
        found.setdefault(value, []).append(names[identity])
    return found


def refuse_if_none(usable: Iterable[Any], names: dict[str, str], reasons: dict[str, str]) -> None:
    """Say why, of every node, where none can work; or note those that cannot.

    Raises:
        PlacementError: none can.
    """
    told = {names[identity]: why for identity, why in reasons.items()}
    if not list(usable):
        raise PlacementError(
            "no node can map the data set: " + "; ".join(f"{name}: {why}" for name, why in told.items()), {TASK: told}
        )
    for name, why in told.items():
        log.warning("map_dataset: node %s is left out: %s", name, why)
