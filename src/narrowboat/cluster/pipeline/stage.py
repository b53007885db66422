"""One stage as its node runs it: a Ray actor with a session of its own part, fed by the stage before it."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from narrowboat.checkpoint import open_index
from narrowboat.cluster.facts import versions
from narrowboat.cluster.pipeline.measure import bandwidth, piece_seconds
from narrowboat.cluster.pipeline.message import Message, pack, unpack
from narrowboat.cluster.pipeline.nodes import Told
from narrowboat.cluster.pipeline.survey import Model, study, weights_identity
from narrowboat.errors import NodeLostError, SessionClosedError
from narrowboat.plan.pipeline.stage import pass_times
from narrowboat.stream.api import session, stream
from narrowboat.stream.session import Session

ROOMS = 32
"""Calls that an actor takes at once: each one that waits occupies one."""
_PROBE = 4 << 20  # bytes
_ECHOES = 7


class StageActor:
    """See the module. Every method returns a ``Told``.

    Args:
        threads: of every operator; the bits depend on it.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._model: Model | None = None
        self._session: Session | None = None
        self._module: Any = None
        self._next: Any = None
        self._begin = self._end = 0
        self._due = 0
        self._waiting: dict[int, Any] = {}
        self._results: dict[int, Told] = {}
        self._turn = threading.Condition()
        self._closed = False
        self._worker: threading.Thread | None = None
        self._took: deque[float] = deque(maxlen=256)
        self._sent: deque[Any] = deque(maxlen=8)

    # -- before it is cut --------------------------------------------------------------------------

    def about(self) -> Told:
        """Versions of what decides about bits."""
        return Told(versions())

    def weights(self, path: str) -> Told:
        """What tells the weights on this node from others."""
        return _told(lambda: weights_identity(open_index(path)))

    def survey(self, factory: Any, path: str, example: Any, no_split: tuple[str, ...], budget: int) -> Told:
        """The chain, what tells it from another, seconds of each piece here, bytes per second, bytes of staging."""

        def find() -> Any:
            torch.set_num_threads(self._threads)
            self._model = model = study(factory, path, example, no_split)
            seconds = piece_seconds(model, budget)
            return model.chain, (model.identity, model.cuts), seconds, bandwidth(model), model.staging

        return _told(find)

    def echo(self, payload: Any) -> Told:
        """Something was received."""
        return Told(len(payload))

    def link_to(self, peer: Any, seconds: float) -> Told:
        """``(latency, bandwidth)`` of the way to another stage: half of a round trip, and what more bytes add."""
        from ray.exceptions import RayError

        def measure() -> tuple[float, float]:
            try:
                return time_link(lambda payload: peer.echo.remote(payload), seconds)
            except RayError as error:  # among them: no answer in time
                raise NodeLostError("the node that it is to send to gave no answer") from error

        return _told(measure)

    # -- its part ----------------------------------------------------------------------------------

    def open(self, begin: int, end: int, budget: int, follower: Any) -> Told:
        """Prepare the pieces ``[begin, end)``: only their weights are ever read. Returns the plan's times.

        Args:
            begin, end: of the model's chain.
            budget: bytes.
            follower: the next stage; None for the last.
        """

        def prepare() -> Any:
            assert self._model is not None
            torch.set_num_threads(self._threads)
            part = self._model.part(begin, end)
            facts = self._model.program.facts
            shapes = tuple(torch.zeros(facts[slot].shape, dtype=facts[slot].dtype) for slot in part.takes)
            self._module = stream(part, self._model.index, budget=budget, example=shapes, strict=False)
            self._session = session(self._module)
            self._begin, self._end, self._next = begin, end, follower
            self._worker = threading.Thread(target=self._run, name="narrowboat-stage", daemon=True)
            self._worker.start()
            return self._session.plan.predicted_latency

        return _told(prepare)

    def accept(self, number: int, given: Any) -> Told:
        """Take the tensors of one input (a Message), or what went wrong with it before (a Told)."""
        with self._turn:
            self._waiting[number] = given
            self._turn.notify_all()
        return Told(number)

    def take(self, number: int, seconds: float) -> Told:
        """Of the last stage: an output, waited for so long."""
        with self._turn:
            self._turn.wait_for(lambda: number in self._results or self._closed, seconds)
            gone = SessionClosedError("the stage was closed, or made nothing in time")
            return self._results.pop(number, None) or Told.failure(gone)

    def standing(self) -> None:
        """Does not return before the stage is closed: who waits for it learns of its end."""
        with self._turn:
            self._turn.wait_for(lambda: self._closed)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._due in self._waiting or self._closed)
                if self._closed:
                    return
                number, given = self._due, self._waiting.pop(self._due)
                self._due += 1
            made = given if isinstance(given, Told) else _told(lambda given=given: self._compute(given))  # type: ignore[misc]
            given = None
            if self._next is None:
                with self._turn:
                    self._results[number] = made
                    self._turn.notify_all()
            else:
                # From actor to actor; Ray serializes it before this returns, so the tensors may change then.
                self._sent.append(self._next.accept.remote(number, made.value if made.failed is None else made))
            made = Told()

    def _compute(self, given: Message) -> Any:
        tensors = unpack(given)
        part = self._module
        inputs = [tensors[slot] for slot in part.takes]
        tensors.clear()
        start = time.perf_counter()
        with torch.inference_mode():
            out = part(*inputs)
        self._took.append(time.perf_counter() - start)
        if self._next is not None:
            return pack(dict(zip(part.gives, out, strict=True)))
        tensor_at = {i: value for i, value in enumerate(out) if isinstance(value, torch.Tensor)}
        values = [None if i in tensor_at else value for i, value in enumerate(out)]
        assert self._model is not None
        return pack(tensor_at), values, self._model.program.output_tree

    # -- what it tells -----------------------------------------------------------------------------

    def stats(self) -> Told:
        """What ``Pipeline.stats`` says of a stage."""
        return _told(self._stats)

    def _stats(self) -> dict[str, Any]:
        assert self._session is not None and self._model is not None
        now = self._session.stats()
        time_of = pass_times(self._session.plan, self._session.prepared.workload()[0])
        names = [piece.name for piece in self._model.chain.pieces[self._begin : self._end]]
        settled = list(self._took)[min(3, max(len(self._took) - 1, 0)) :]
        return {
            "pieces": names,
            "budget_bytes": now["budget_bytes"],
            "min_budget_bytes": now["min_budget_bytes"],
            "peak_bytes": now["peak_bytes"],
            "weight_bytes": now["weight_bytes"],
            "resident_bytes": now["resident_bytes"],
            "bytes_read": now["bytes_read"],
            "bytes_read_in_all": self._session.reader.bytes_read,
            "passes": now["passes"],
            "predicted_first_ms": time_of.first * 1e3,
            "predicted_steady_ms": time_of.steady * 1e3,
            "measured_ms": statistics.median(settled) * 1e3 if settled else None,
            "bandwidth_bytes_per_s": now["bandwidth_bytes_per_s"],
        }

    def close(self) -> Told:
        """Give everything back."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        if self._worker is not None:
            self._worker.join(timeout=5)
        with contextlib.suppress(Exception):
            if self._session is not None:
                self._session.close()
        return Told(True)


def time_link(send: Callable[[Any], Any], seconds: float) -> tuple[float, float]:
    """``(latency in seconds, bytes per second)`` of sending to an actor.

    Args:
        send: calls the receiver's ``echo`` and returns the reference.
        seconds: for each of the calls.
    """
    import numpy as np
    import ray

    def quickest(payload: Any, times: int) -> float:
        best = float("inf")
        for _ in range(times):
            start = time.perf_counter()
            ray.get(send(payload), timeout=seconds)
            best = min(best, time.perf_counter() - start)
        return best

    small = quickest(np.zeros(1, dtype=np.uint8), _ECHOES)
    large = quickest(np.zeros(_PROBE, dtype=np.uint8), 3)
    return small / 2, _PROBE / max(large - small, 1e-6)


def _told(work: Callable[[], Any]) -> Told:
    try:
        return Told(work())
    except Exception as error:
        return Told.failure(error)
