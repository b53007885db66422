"""One node's worker: holds the model's session within the node's budget, and passes inputs through it."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import narrowboat as nb
from narrowboat.cluster.dataset.counts import WorkerCounts
from narrowboat.cluster.dataset.job import Job, Model
from narrowboat.cluster.dataset.outputs import name_outputs
from narrowboat.cluster.dataset.survey import check_terms, reason, unpickle
from narrowboat.cluster.dataset.wire import let_store_go, pack, unpack
from narrowboat.cluster.link import Failure
from narrowboat.errors import MapError, NarrowboatError
from narrowboat.profile.warmup import warm_up


@dataclass(frozen=True)
class Swept:
    """What became of some inputs.

    Attributes:
        outputs: packed, by column; of the inputs before ``failed`` if one did.
        group: inputs per sweep that the session has decided on.
        failed: place of the first input that the model refused, from 0; None if none.
        said: what it said.
        failure: what is wrong with the session, its weights or its budget; the job cannot go on.
    """

    outputs: list[Any]
    group: int = 1
    failed: int | None = None
    said: str = ""
    failure: Failure | None = None


@dataclass(frozen=True)
class Opened:
    """What became of a worker that was to begin.

    Attributes:
        own: the sender that asked is the first.
        refusal: why this node cannot work; "" if it can.
        failure: what would be met on every node.
    """

    own: bool = False
    refusal: str = ""
    failure: Failure | None = None


class Worker:
    """Lives in a Ray actor that has the node's bytes booked. One call at a time.

    Args:
        job: what is to be done.
        counts: which node it is, and what it has; kept from here on.
    """

    def __init__(self, job: Job, counts: WorkerCounts) -> None:
        self._job, self._counts = job, counts
        self._id = uuid.uuid4().hex
        self._first = ""
        self._model: Any = None
        self._session: Any = None
        self._waiting: deque[Any] = deque()
        self._outputs: Iterator[Any] | None = None
        self._batch: int | None = None

    def open(self, who: str) -> Opened:
        """Build the session, unless there is one.

        Args:
            who: a sender; the first one to ask is the one that the worker is of.
        """
        if self._session is not None:
            return Opened(self._first == who)
        self._first = who
        try:
            told = unpickle(self._job.model)
            check_terms(self._job.terms, told.weights)
            self._build(told)
        except Exception as error:  # whatever it is: other nodes may do
            return Opened(refusal=reason(error, self._counts.budget))
        try:
            self._batch = told.inputs_per_sweep
            self._begin()
        except NarrowboatError as error:
            self.close()
            return Opened(failure=Failure.of(error))
        self._tell()
        return Opened(own=True)

    def _build(self, told: Model) -> None:
        torch.set_num_threads(told.threads)
        warm_up()
        let_store_go()
        model = nb.stream(
            told.factory,
            told.weights,
            budget=self._counts.budget,
            example=told.example,
            strict=told.strict,
            verify=told.verify,
        )
        self._model = model.eval()
        self._session = nb.session(model)

    def sweep(self, inputs: list[Any]) -> Swept:
        """Pass inputs through the model.

        Args:
            inputs: packed arguments, one for each.
        """
        if self._session is None:
            return Swept([], failure=Failure("NodeLostError", "the worker's session is closed"))
        outputs: list[Any] = []
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                for place, output in enumerate(self._through(inputs)):
                    if isinstance(output, MapError):
                        cause = output.__cause__
                        said = f"{type(cause).__name__}: {cause}"
                        self._forget()
                        return Swept(outputs, self._group, place, said)
                    outputs.append(self._packed(output))
        except NarrowboatError as error:
            self._forget()
            return Swept(outputs, failure=Failure.of(error))
        finally:
            counts = self._counts
            counts.seconds += time.perf_counter() - start
            counts.inputs += len(outputs)
            self._tell()
            let_store_go()
        return Swept(outputs, self._group)

    @property
    def _group(self) -> int:
        """Inputs that are wanted at once: less, and the map would end in the middle of a group and begin anew."""
        return max(int(self._session.maps.group), 1)

    def _packed(self, output: Any) -> Any:
        rows = self._job.rows
        return pack(output if rows.finish is not None else name_outputs(output, rows.output))

    def _begin(self) -> None:
        """One map for all sweeps to come, so that the plan is chosen once."""
        self._outputs = self._session.map(self._feed(), self._batch, errors="return")

    def _feed(self) -> Iterator[Any]:
        while self._waiting:
            yield unpack(self._waiting.popleft())

    def _through(self, inputs: list[Any]) -> Iterator[Any]:
        """The outputs of these inputs. The map ends where its group was not full, and is then begun anew."""
        self._waiting.extend(inputs)
        left = len(inputs)
        while left:
            if self._outputs is None:
                self._begin()
            assert self._outputs is not None
            try:
                output = next(self._outputs)
            except StopIteration:
                self._outputs = None
                continue
            left -= 1
            yield output

    def _forget(self) -> None:
        """What a failed sweep has left."""
        self._waiting.clear()
        outputs, self._outputs = self._outputs, None
        if outputs is not None:
            outputs.close()  # type: ignore[attr-defined]

    def _tell(self) -> None:
        if self._session is not None and not self._session.closed:
            self._counts.bytes_read = self._session.reader.bytes_read
            self._counts.peak_bytes = self._session.peak_bytes
            self._counts.inputs_per_sweep = self._group
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # measurements are lost with who asked for them
            ray.get(self._job.keeper.note.remote(self._id, self._counts))

    def close(self) -> None:
        """Close the session; idempotent."""
        if self._session is None:
            return
        self._forget()
        self._tell()
        self._session.close()
        self._session = self._model = None
        self._counts.closed = True
        self._tell()
