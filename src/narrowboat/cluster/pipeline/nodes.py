"""The nodes of a Ray cluster as a pipeline sees them, and calls to its actors that always end."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from narrowboat.cluster.link import Failure
from narrowboat.cluster.machines import living_machines
from narrowboat.cluster.ray_cluster import no_memory_offered, require_ray
from narrowboat.cluster.settings import MEMORY
from narrowboat.errors import NoClusterError, NodeLostError, UsageError
from narrowboat.quantities import format_bytes, parse_bytes


@dataclass(frozen=True)
class Host:
    """A node that may run a stage.

    Attributes:
        identity: Ray's, hexadecimal.
        name: for people.
        offered: bytes that it gives to narrowboat.
        budget: bytes of them that the stage may take.
    """

    identity: str
    name: str
    offered: int
    budget: int


def join() -> None:
    """Be connected to a Ray cluster.

    Raises:
        NoClusterError: Ray is not installed, or no cluster is to be found.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NoClusterError(
            f"no Ray cluster is running here ({str(error).splitlines()[0]}): start one with `ray start --head`, or "
            "call ray.init(address=...) first"
        ) from error


def hosts(
    wanted: Sequence[str] | None,
    budget: int | str | Mapping[str, int | str] | None,
    without: Collection[str] = (),
) -> list[Host]:
    """The nodes that live and offer memory, the largest first.

    Args:
        wanted: names or identities; None for all.
        budget: bytes for the stage on each node, or by node; None for all that it offers.
        without: identities of nodes that are not to be used.

    Raises:
        NoClusterError: there is none.
        UsageError: a node that was named is not there, or offers less than it is to take.
    """
    found = [
        (machine.name, machine.identity, machine.budget)
        for machine in living_machines()
        if machine.budget > 0 and machine.identity not in without
    ]
    if not found:
        raise no_memory_offered()
    known = {key for name, identity, _ in found for key in (name, identity)}
    asked = [*(wanted or ()), *(budget if isinstance(budget, Mapping) else ())]
    missing = [key for key in asked if key not in known]
    if missing and not without:
        raise UsageError(
            f"there is no node {missing[0]!r} that lives and offers memory: there are "
            + ", ".join(f"{name} ({format_bytes(offered)})" for name, _, offered in sorted(found))
        )
    made = []
    for name, identity, offered in found:
        if wanted is not None and not {name, identity} & set(wanted):
            continue
        nbytes = _budget_of(budget, name, identity, offered)
        if nbytes > offered:
            raise UsageError(
                f"node {name} offers {format_bytes(offered)} ({MEMORY}), and is to give {format_bytes(nbytes)}"
            )
        made.append(Host(identity, name, offered, nbytes))
    return sorted(made, key=lambda host: (-host.budget, host.name))


def _budget_of(budget: int | str | Mapping[str, int | str] | None, name: str, identity: str, offered: int) -> int:
    given = budget.get(name, budget.get(identity)) if isinstance(budget, Mapping) else budget
    return offered if given is None else parse_bytes(given, what="budget")


@dataclass(frozen=True)
class Told:
    """What an actor's method came to: errors of ours keep their class and facts on the way.

    Attributes:
        value: what it returned.
        failed: what it raised instead.
    """

    value: Any = None
    failed: Failure | None = None

    @classmethod
    def failure(cls, error: BaseException) -> Told:
        """An error on its way."""
        return cls(failed=Failure.of(error))

    def open(self, where: str = "") -> Any:
        """The value.

        Args:
            where: put before the error's message.

        Raises:
            Exception: what the method raised; a class that is not known here comes as a ClusterError.
        """
        if self.failed is not None:
            raise self.failed.error(where)
        return self.value


def answer(reference: Any, seconds: float, node: str, what: str) -> Any:
    """What an actor answers, waited for no longer than ``seconds``.

    Raises:
        NodeLostError: it died, or said nothing in time.
        NarrowboatError: what it raised.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        told = ray.get(reference, timeout=max(seconds, 0.0))
    except GetTimeoutError:
        raise NodeLostError(f"node {node} did not {what} within {seconds:.0f} s") from None
    except RayError as error:
        raise NodeLostError(f"node {node} was lost when it had to {what}: {type(error).__name__}") from error
    return told.open(f"node {node}") if isinstance(told, Told) else told


def answers(references: Mapping[str, Any], seconds: float, what: str) -> dict[str, Any]:
    """Of several nodes, by name, within one deadline. Raises as ``answer`` does, for the first that fails."""
    end = time.monotonic() + seconds
    return {node: answer(ref, end - time.monotonic(), node, what) for node, ref in references.items()}
