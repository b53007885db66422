"""The actors of one placement: started, asked what the model costs them, linked, given their parts; and given up."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from narrowboat.cluster.facts import differing, versions
from narrowboat.cluster.pipeline.nodes import Host, answer, answers
from narrowboat.cluster.pipeline.stage import ROOMS, StageActor, time_link
from narrowboat.cluster.settings import MEMORY
from narrowboat.errors import (
    BudgetError,
    ClusterError,
    NodeLostError,
    NodeVersionError,
    PlacementError,
    WeightsMismatchError,
)
from narrowboat.plan.model import Machine
from narrowboat.plan.pipeline import Chain, Link, Node, Split, split
from narrowboat.plan.pipeline.model import CALLER

log = logging.getLogger("narrowboat")
START = 120.0  # seconds for an actor to be there, its libraries imported
STUDY = 600.0  # seconds for the model to be built, traced and measured, or for a stage to be prepared
ASK = 20.0  # seconds for a small question
_CONTENTION = 0.08  # as a session assumes where it was not measured


@dataclass(frozen=True)
class Request:
    """What is to be run.

    Attributes:
        factory: makes the module; has to be importable, or picklable, on every node.
        weights: path of the weights, by a node's name or identity; "" for the others.
        example: inputs.
        no_split: class names of modules that are not looked into for cuts.
        threads: of every operator.
        objective: of the split.
        stages, in_flight: as ``plan.pipeline.split`` takes them.
    """

    factory: Callable[[], Any]
    weights: Mapping[str, str]
    example: Any
    no_split: tuple[str, ...]
    threads: int
    objective: str
    stages: int | None
    in_flight: int | None

    def path_for(self, host: Host) -> str:
        """Of the weights on a node."""
        return self.weights.get(host.name) or self.weights.get(host.identity) or self.weights.get("", "")


class Crew:
    """Actors on their nodes, with a part each.

    Attributes:
        actors: by the node's name.
        split: which part each has.
        links: as measured, by sender and receiver.
        chain: the model's pieces.
    """

    def __init__(self, request: Request, hosts: Sequence[Host]) -> None:
        self.request = request
        self.actors: dict[str, Any] = {}
        self.hosts = {host.name: host for host in hosts}
        self.links: dict[tuple[str, str], Link] = {}
        self.split: Split
        self.chain: Chain
        self._watches: dict[Any, str] = {}
        try:
            self._start(hosts)
            self._check()
            nodes = self._survey()
            self._link()
            self.split = split(
                self.chain,
                nodes,
                self.links,
                objective=request.objective,
                in_flight=request.in_flight,
                stages=request.stages,
            )
            self._part()
        except BaseException:
            self.close()
            raise

    # -- making it ---------------------------------------------------------------------------------

    def _start(self, hosts: Sequence[Host]) -> None:
        import ray

        remote = ray.remote(StageActor)
        for host in hosts:
            self.actors[host.name] = remote.options(
                num_cpus=0,
                max_concurrency=ROOMS,
                max_restarts=0,
                resources={MEMORY: host.budget},
                label_selector={"ray.io/node-id": host.identity},
            ).remote(self.request.threads)

    def _check(self) -> None:
        """Everything that has to be the same on all nodes."""
        end = time.monotonic() + START
        here = versions()
        for name, actor in self.actors.items():
            try:
                there = answer(actor.about.remote(), end - time.monotonic(), name, "start a stage")
            except NodeLostError as error:
                raise NodeLostError(
                    f"{error}; is its {MEMORY} taken by something else, or narrowboat not installed there?"
                ) from error
            other = differing(here, there)
            if other:
                raise NodeVersionError(f"node {name} has {other}: install the same on every node")
        asked = {
            name: actor.weights.remote(self.request.path_for(self.hosts[name])) for name, actor in self.actors.items()
        }
        digests = answers(asked, ASK, "look at the weights")
        first = next(iter(digests))
        for name, digest in digests.items():
            if digest != digests[first]:
                raise WeightsMismatchError(
                    f"the weights on node {name} ({self.request.path_for(self.hosts[name])}) are not those on node "
                    f"{first}: copy one file to both"
                )

    def _survey(self) -> list[Node]:
        asked = {
            name: actor.survey.remote(
                self.request.factory,
                self.request.path_for(self.hosts[name]),
                self.request.example,
                self.request.no_split,
                self.hosts[name].budget,
            )
            for name, actor in self.actors.items()
        }
        found = answers(asked, STUDY, "study the model")
        first = next(iter(found))
        self.chain, identity, reference, _, _ = found[first]
        for name, (_, other, *_) in found.items():
            if other != identity:
                raise NodeVersionError(
                    f"node {name} makes another model of the factory than node {first}: its code is not the same"
                )
        self.chain = _timed(self.chain, reference)
        return [
            Node(
                name,
                self.hosts[name].budget,
                Machine(bandwidth=bandwidth, contention=_CONTENTION),
                sum(seconds) / max(sum(reference), 1e-9),
                staging,
            )
            for name, (_, _, seconds, bandwidth, staging) in found.items()
        ]

    def _link(self) -> None:
        for name, actor in self.actors.items():
            self.links[CALLER, name] = _link_of(lambda payload, actor=actor: actor.echo.remote(payload), name)  # type: ignore[misc]
            self.links[name, CALLER] = self.links[CALLER, name]
            for other, peer in self.actors.items():
                if other != name:
                    # The actor gives up by itself well before it is given up here.
                    measured = answer(actor.link_to.remote(peer, ASK / 4), ASK * 3, name, f"reach node {other}")
                    self.links[name, other] = Link(*measured)

    def _part(self) -> None:
        import ray

        used = [stage.node for stage in self.split.stages]
        for name in set(self.actors) - set(used):
            ray.kill(self.actors.pop(name))
        asked = {}
        for stage, follower in zip(self.split.stages, [*used[1:], None], strict=True):
            peer = self.actors[follower] if follower is not None else None
            asked[stage.node] = self.actors[stage.node].open.remote(stage.begin, stage.end, stage.budget, peer)
        try:
            answers(asked, STUDY, "prepare its part")
        except BudgetError as error:
            raise PlacementError(f"{error} (beside what waits in its queue)") from error
        self._watches = {actor.standing.remote(): name for name, actor in self.actors.items()}
        log.info("pipeline over %s", ", ".join(f"{s.node} [{s.begin}, {s.end})" for s in self.split.stages))

    # -- running it --------------------------------------------------------------------------------

    def send(self, number: int, message: Any) -> None:
        """One input's tensors to the first stage."""
        self.actors[self.split.stages[0].node].accept.remote(number, message)

    def fetch(self, number: int, seconds: float) -> Any:
        """The output of an input, as the last stage tells it.

        Raises:
            NodeLostError: a node died, or says nothing any more.
            ClusterError: every node is there, and the output is not, after so many seconds.
        """
        import ray
        from ray.exceptions import RayError

        last = self.split.stages[-1].node
        # The stage waits longer than is waited for it: who is late is found out here.
        reference = self.actors[last].take.remote(number, seconds + ASK)
        ready, _ = ray.wait([reference, *self._watches], num_returns=1, timeout=max(seconds, 0.0))
        lost = [self._watches[ref] for ref in ready if ref in self._watches]
        if lost:
            raise NodeLostError(f"node {lost[0]} died with a stage of the model on it")
        if not ready:
            self.find_silent(seconds)
        try:
            told = ray.get(reference, timeout=ASK)
        except RayError as error:
            raise NodeLostError(f"node {last} died with the last stage of the model on it") from error
        return told.open()

    def find_silent(self, seconds: float) -> None:
        """Nothing came for so long: who is it that says nothing?"""
        silent = []
        asked = {name: actor.about.remote() for name, actor in self.actors.items()}
        end = time.monotonic() + ASK / 4
        for name, reference in asked.items():
            try:
                answer(reference, max(end - time.monotonic(), 0.1), name, "answer")
            except ClusterError:
                silent.append(name)
        if silent:
            raise NodeLostError(
                f"node {', node '.join(silent)} has not been heard of while an output was due for {seconds:.0f} s"
            )
        raise ClusterError(f"no output came within {seconds:.0f} s, though every node answers: give a longer timeout=")

    def stats(self) -> list[dict[str, Any]]:
        """Of each stage, in order."""
        asked = {stage.node: self.actors[stage.node].stats.remote() for stage in self.split.stages}
        found = answers(asked, ASK, "tell how it does")
        return [{"node": stage.node, **found[stage.node]} for stage in self.split.stages]

    def lost(self) -> set[str]:
        """Identities of nodes whose actor does not answer."""
        gone = set()
        asked = {name: actor.about.remote() for name, actor in self.actors.items()}
        end = time.monotonic() + ASK / 4
        for name, reference in asked.items():
            try:
                answer(reference, max(end - time.monotonic(), 0.1), name, "answer")
            except ClusterError:
                gone.add(self.hosts[name].identity)
        return gone

    def close(self) -> None:
        """Every actor gives its memory back and ends; one that does not answer is ended. Never raises."""
        import ray

        with contextlib.suppress(Exception):
            if self.actors and ray.is_initialized():
                asked = [actor.close.remote() for actor in self.actors.values()]
                ray.wait(asked, num_returns=len(asked), timeout=ASK / 4)
        for actor in self.actors.values():
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self.actors = {}
        self._watches = {}


def _timed(chain: Chain, seconds: Sequence[float]) -> Chain:
    """The chain with its pieces' estimated times replaced by measured ones, spread over their steps as estimated."""
    pieces = []
    for piece, took in zip(chain.pieces, seconds, strict=True):
        factor = took / max(sum(piece.workload.step_seconds), 1e-12)
        steps = tuple(step * factor for step in piece.workload.step_seconds)
        pieces.append(replace(piece, workload=replace(piece.workload, step_seconds=steps)))
    return replace(chain, pieces=tuple(pieces))


def _link_of(send: Callable[[Any], Any], node: str) -> Link:
    """The caller's own link to a node."""
    from ray.exceptions import RayError

    try:
        return Link(*time_link(send, ASK / 4))
    except RayError as error:  # among them: no answer in time
        raise NodeLostError(f"node {node} did not answer while its link was measured") from error
