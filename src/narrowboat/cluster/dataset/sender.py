"""What Ray Data runs for every batch: makes inputs of its rows, has a worker map them, makes columns of the outputs.

Senders hold no model and no memory of a node's account, and there is always a node on which Ray can start one again.
Were the workers themselves Ray Data's actors, one whose node has died could wait for ever for another with room, and
its batches with it: here a batch whose worker is lost goes to another one that lives.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from narrowboat.cluster.dataset.columns import with_columns
from narrowboat.cluster.dataset.counts import WorkerCounts
from narrowboat.cluster.dataset.job import Job
from narrowboat.cluster.dataset.nodes import free_bytes, room
from narrowboat.cluster.dataset.outputs import columns_of
from narrowboat.cluster.dataset.rows import describe
from narrowboat.cluster.dataset.wire import pack, unpack
from narrowboat.cluster.dataset.worker import Opened, Swept
from narrowboat.cluster.link import Failure
from narrowboat.cluster.machines import Machine, living_machines
from narrowboat.errors import NodeLostError, RowError, UsageError

log = logging.getLogger("narrowboat")
_DEATHS = 4  # workers that may die of the same inputs
_LEAST = 8  # inputs per call where sweeps are shorter: a call costs about a millisecond
_FIRST = 16  # inputs of the first call, when the session has not decided yet
_OPEN = 600.0  # seconds for a worker to build its session
_CLOSE = 20.0  # seconds for a worker to close its session
_IDLE = 30.0  # seconds without a batch after which the worker is let go
_LOOK = 5.0  # seconds between looks for a node without a worker
_PAUSE = 1.0  # seconds between looks for any node


@dataclass
class Known:
    """A worker as a sender knows it.

    Attributes:
        machine: its node.
        handle: of the actor.
        group: inputs to send at once; 0 while that is not known.
        own: this sender was the first to ask for it.
    """

    machine: Machine
    handle: Any
    group: int = 0
    own: bool = True


class Sender:
    """A callable class, as ``Dataset.map_batches`` takes it; may be called by several threads at once.

    Args:
        job: what is to be done.
    """

    def __init__(self, job: Job) -> None:
        from ray import cloudpickle

        self._job = job
        self._lock = threading.Lock()
        self._berth: Known | None = None
        self._active = 0
        self._timer: threading.Timer | None = None
        self._pickled = cloudpickle.dumps(job)
        self._unfit: dict[str, str] = {}
        self._looked = 0.0

    def __call__(self, table: Any) -> Any:
        """Map a batch.

        Args:
            table: of Arrow.

        Raises:
            RowError: a row cannot be mapped.
            NodeLostError: no node is left.
            NarrowboatError: what a session on a node raised.
        """
        kept = self._job.rows.carried(table)
        if table.num_rows == 0:
            return kept
        with self._at_work():
            return self._mapped(table, kept)

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Between batches a worker is kept for a while, and no longer.

        After an error the actors of Ray Data live for as long as somebody keeps its traceback, as notebooks do.
        """
        with self._lock:
            self._active += 1
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                if not self._active:
                    self._timer = threading.Timer(_IDLE, _let_go, (weakref.ref(self),))
                    self._timer.daemon = True
                    self._timer.start()

    def rest(self) -> None:
        """No batch has come for a while: let the worker go. The next batch starts one again."""
        with self._lock:
            if not self._active:
                self._close()

    def _mapped(self, table: Any, kept: Any) -> Any:
        rows = self._job.rows
        inputs = rows.inputs(table)
        places = [place for place, value in enumerate(inputs) if value is not None]
        outputs: list[dict[str, Any] | None] = [None] * len(inputs)
        done = 0
        while done < len(places):
            part = places[done : done + self._size()]
            swept, name = self._send([pack(inputs[place]) for place in part])
            for place, output in zip(part, swept.outputs, strict=False):
                outputs[place] = self._finished(table, place, unpack(output))
                inputs[place] = None
            if swept.failed is not None:
                self._refuse(table, part[swept.failed], swept.said, name)
            done += len(part)
        made = columns_of(outputs)
        twice = [column for column in made if column in kept.column_names]
        if twice:
            raise UsageError(
                f"the data set has a column {twice[0]!r} already: give outputs another name with output=, or "
                "leave the column out with keep="
            )
        return with_columns(kept, made)

    def _refuse(self, table: Any, place: int, said: str, name: str) -> None:
        fed = ", ".join(repr(column) for column in self._job.rows.used(table))
        raise RowError(
            f"{describe(table, place)}: the model failed on it on node {name}, with {fed}: {said}", index=place
        )

    def _finished(self, table: Any, place: int, output: Any) -> dict[str, Any]:
        finish = self._job.rows.finish
        if finish is None:
            return dict(output)
        try:
            return dict(finish(output))
        except Exception as error:
            raise RowError(
                f"{describe(table, place)}: finish failed: {type(error).__name__}: {error}", index=place
            ) from error

    def _size(self) -> int:
        group = self._berth.group if self._berth is not None else 0
        if not group:
            return _FIRST
        return group * max(_LEAST // group, 1)

    # -- the worker --------------------------------------------------------------------------------

    def _send(self, inputs: list[Any]) -> tuple[Swept, str]:
        """Have a worker map them, another if it dies; returns that and the node's name."""
        import ray
        from ray.exceptions import ActorUnavailableError, RayActorError, RaySystemError

        said = ""
        for _ in range(_DEATHS):
            berth = self._worker()
            try:
                swept: Swept = ray.get(berth.handle.sweep.remote(inputs))
            except (RayActorError, ActorUnavailableError, RaySystemError) as error:
                said = _last_line(error)
                log.warning("map_dataset: the worker on node %s is lost: %s", berth.machine.name, said)
                self._lose(berth)
                continue
            if swept.failure is not None and swept.failure.kind == "NodeLostError":
                self._lose(berth)
                continue
            if swept.failure is not None:
                raise swept.failure.error()
            berth.group = swept.group
            return swept, berth.machine.name
        raise NodeLostError(f"{_DEATHS} workers were lost with the same {len(inputs)} inputs, the last by: {said}")

    def _lose(self, berth: Known) -> None:
        with self._lock:
            if self._berth is berth:
                self._berth = None

    def _worker(self) -> Known:
        with self._lock:
            if self._berth is not None and not self._berth.own and time.monotonic() - self._looked > _LOOK:
                self._looked = time.monotonic()
                better = next((machine for machine in self._candidates() if not self._taken(machine)), None)
                if better is not None and isinstance(found := self._take(better), Known):
                    self._berth = found
            if self._berth is None:
                self._berth = self._find()
            return self._berth

    def _find(self) -> Known:
        """A worker on a node that has none yet, on this node if it can be; else a share of another sender's."""
        deadline = time.monotonic() + self._job.patience
        reasons: dict[str, str] = {}
        while True:
            for machine in self._candidates():
                found = self._take(machine)
                if isinstance(found, Known):
                    return found
                if isinstance(found, Failure):
                    raise found.error()
                reasons[machine.name] = found
            if time.monotonic() > deadline:
                told = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "none is left"
                raise NodeLostError(f"no node could map a batch for {self._job.patience:g} s: {told}")
            time.sleep(_PAUSE)

    def _candidates(self) -> Iterator[Machine]:
        """Nodes that live and may work, in the order in which they are to be tried."""
        here, job = _own_node(), self._job
        fit = []
        for machine in living_machines():
            known = machine.identity in job.nodes
            if machine.identity in self._unfit or not (known or (job.open and machine.identity not in job.refused)):
                continue
            if room(machine, job.budget, machine.budget)[1]:
                continue
            fit.append(machine)
        rank = {machine.identity: (self._taken(machine), machine.identity != here) for machine in fit}
        # Senders without a node of their own are spread over the others by what tells them apart.
        salt = _own_worker()
        fit.sort(key=lambda machine: (*rank[machine.identity], hash((salt, machine.identity))))
        yield from fit

    def _name(self, machine: Machine) -> str:
        return f"{self._job.name}-{machine.identity}"

    def _taken(self, machine: Machine) -> bool:
        import ray

        try:
            ray.get_actor(self._name(machine))
        except ValueError:
            return False
        return True

    def _take(self, machine: Machine) -> Known | Failure | str:
        """The worker of a node, started if there is none; or why there cannot be one."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        taken = self._taken(machine)
        budget, why = room(machine, self._job.budget, machine.budget)
        if not taken and not why:
            budget, why = room(machine, self._job.budget, free_bytes().get(machine.identity, 0))
        if why:
            return why
        counts = WorkerCounts(machine.identity, machine.name, budget)
        handle: Any = None
        try:
            handle = ray.get(self._job.keeper.start.remote(self._name(machine), self._pickled, counts))
            opened: Opened = ray.get(handle.open.remote(_own_worker()), timeout=_OPEN)
        except GetTimeoutError:
            with contextlib.suppress(RayError):
                ray.kill(handle)
            return f"its worker was not ready within {_OPEN:g} s"
        except RayError as error:
            return f"its worker died: {_last_line(error)}"
        if opened.failure is not None:
            return opened.failure
        if opened.refusal:
            self._unfit[machine.identity] = opened.refusal
            log.warning("map_dataset: node %s cannot work: %s", machine.name, opened.refusal)
            with contextlib.suppress(RayError):
                ray.kill(handle)
            return opened.refusal
        return Known(machine, handle, own=opened.own)

    def close(self) -> None:
        """The data set has been read: close the session of the worker, whoever it was of.

        Another data set that is being read from the same job finds it closed, and starts it anew.
        """
        timer = self._timer
        if timer is not None:
            timer.cancel()
        self._close()

    def _close(self) -> None:
        import ray

        berth, self._berth = self._berth, None
        if berth is None:
            return
        with contextlib.suppress(Exception):  # Ray may be on its way out, and the worker with it
            ray.get(berth.handle.close.remote(), timeout=_CLOSE)
            ray.kill(berth.handle)

    def __del__(self) -> None:
        self.close()


def _let_go(sender: weakref.ref[Sender]) -> None:
    # Weakly: Ray Data ends a sender by forgetting it, and a timer must not remember it.
    found = sender()
    if found is not None:
        found.rest()


def _own_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _own_worker() -> str:
    import ray

    return str(ray.get_runtime_context().get_worker_id())


def _last_line(error: Exception) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return said[-1] if said else type(error).__name__
