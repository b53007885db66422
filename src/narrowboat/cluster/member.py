"""A node as the ingress keeps it: whether it is there, what it was given, who waits for it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from narrowboat.cluster.link import NodeLink
from narrowboat.cluster.machines import Machine
from narrowboat.errors import NodeLostError

MemberState = Literal["joining", "ready", "silent", "lost", "refused"]


@dataclass
class Member:
    """One node.

    Attributes:
        machine: which it is.
        state: only "ready" is sent requests. "silent" has not answered for a while; "lost" is dead, or was silent for
            so long that its tasks were moved; "refused" cannot be used.
        said: why, in words.
        link: to its executor; None until it is there.
        about: what it said of itself.
        learned: by task, what it costs there, or why it cannot run there.
        tasks: that it was given.
        faces: of them, as it told.
        plan: in force there.
        tick: the newest picture of it.
        heard: when it answered last, by the monotonic clock.
        under_way: requests to it, by task.
        gone: set when what waits for it should wait no more.
        longest: longest way there and back that a request took, microseconds.
        retry: of a refused node that could not be reached: when to try it again, by the monotonic clock; else None.
    """

    machine: Machine
    state: MemberState = "joining"
    said: str = "it has just been seen"
    link: NodeLink | None = None
    about: dict[str, Any] = field(default_factory=dict)
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    faces: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    tick: dict[str, Any] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    under_way: Counter[str] = field(default_factory=Counter)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    longest: int = 0
    retry: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.machine.name

    def answers(self) -> None:
        """It has just answered."""
        self.heard = time.monotonic()

    def becomes(self, state: MemberState, said: str = "") -> None:
        """Another state; whoever waits for a node that is not there any more is told."""
        self.state, self.said, self.retry = state, said, None
        if state in ("silent", "lost", "refused"):
            self.gone.set()
        elif self.gone.is_set():
            self.gone = asyncio.Event()

    async def ask(self, method: str, *arguments: Any, seconds: float, lost: float) -> Any:
        """A call that may take long, to a node that answers other questions meanwhile.

        Args:
            method, arguments: see ``link.NodeLink.call``.
            seconds: that it may take.
            lost: seconds without any answer, after which nothing is waited for any more: a cut cable is not known by
                what comes, and whoever waits may keep others from being moved.

        Raises:
            TimeoutError: it took longer.
            NodeLostError: the node is not reached any more.
        """
        if self.link is None:
            raise NodeLostError(f"node {self.name} is {self.state}: {self.said}")
        until = time.monotonic() + seconds
        call = asyncio.ensure_future(self.link.call(method, *arguments))
        asked = [call]
        try:
            while True:
                await asyncio.wait({call}, timeout=max(min(lost / 4, until - time.monotonic()), 0.0))
                if call.done():
                    return call.result()
                if time.monotonic() >= until:
                    raise TimeoutError
                beat = asyncio.ensure_future(self.link.call("beat"))
                asked[1:] = [beat]
                await asyncio.wait({call, beat}, timeout=lost, return_when=asyncio.FIRST_COMPLETED)
                if call.done():
                    return call.result()
                if not beat.done():
                    raise NodeLostError(f"node {self.name} has not answered for {lost:g} s")
                beat.result()
        finally:
            for one in asked:
                one.cancel()
                one.add_done_callback(heard)

    def can(self, task: str) -> bool:
        """It knows the task's costs, and nothing speaks against it."""
        told = self.learned.get(task)
        return told is not None and "reason" not in told

    def why_not(self, task: str) -> str:
        """Why the task cannot run here; "" if it can."""
        if self.state != "ready":
            return f"it is {self.state}: {self.said}" if self.said else f"it is {self.state}"
        told = self.learned.get(task)
        return "it has not been asked yet" if told is None else str(told.get("reason", ""))

    def as_json(self) -> dict[str, Any]:
        """For whoever watches."""
        return {
            "name": self.name,
            "identity": self.machine.identity,
            "state": self.state,
            "said": self.said,
            "budget_bytes": self.machine.budget,
            "needed_bytes": self.plan.get("needed_bytes", 0),
            "held_bytes": self.tick.get("held_bytes", 0),
            "peak_bytes": self.tick.get("peak_bytes", 0),
            "utilisation": self.plan.get("utilisation", 0.0),
            "tasks": list(self.tasks),
            "host": self.about.get("host", ""),
            "versions": self.about.get("versions", {}),
            "longest_way_us": self.longest,
        }


def heard(call: asyncio.Future[Any]) -> None:
    """Whatever became of a call nobody waits for any more: it is no error that nobody has seen."""
    if not call.cancelled():
        call.exception()
