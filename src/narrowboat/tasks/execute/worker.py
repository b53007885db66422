"""A task's own thread: it computes its jobs block by block, each when the dispatcher says so."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from narrowboat.arena.device.cuda import named
from narrowboat.errors import NarrowboatError
from narrowboat.tasks.execute import realtime
from narrowboat.tasks.execute.gate import JobEnded
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.job import Job


class Dispatcher(Protocol):
    """Whom workers report to; from their threads."""

    def computed(self, worker: Worker, block: int) -> None:
        """A block before the last has been computed."""

    def finished(self, worker: Worker, job: Job, output: Any, error: BaseException | None) -> None:
        """A job has come to its end, or failed."""


class _Run:
    """One job on its way; a run of its own for each, so that the end of one is never taken for another's."""

    def __init__(self, job: Job, inputs: tuple[Any, ...]) -> None:
        self.job, self.inputs = job, inputs
        self.go = threading.Semaphore(0)
        self.ended = False


class Worker(threading.Thread):
    """The thread.

    Args:
        name: of the task.
        model: its network.
        begin: called in this thread when it starts.
        dispatcher: is told.
    """

    def __init__(self, name: str, model: TaskModel, begin: Callable[[], None], dispatcher: Dispatcher) -> None:
        super().__init__(name=f"narrowboat-{name}", daemon=True)
        self.model = model
        self.block = -1
        self._begin, self._dispatcher = begin, dispatcher
        self._runs: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._asked: _Run | None = None  # the dispatcher's
        self._under_way: _Run | None = None  # this thread's
        model.boundary = _at_boundary

    def compute(self, job: Job, block: int, inputs: tuple[Any, ...]) -> None:
        """From the dispatcher: compute a block of the job; the job begins with its first."""
        if self._asked is None or self._asked.job is not job:
            self._asked = _Run(job, inputs)
            self._runs.put(self._asked)
        self._asked.go.release()

    def end_job(self) -> None:
        """From the dispatcher: a job that waits at a boundary ends there, if there is one."""
        if self._asked is not None:
            self._asked.ended = True
            self._asked.go.release()
            self._asked = None

    def stop(self) -> None:
        """End when there is no job."""
        self._runs.put(None)

    def at_boundary(self, block: int) -> None:
        """In this thread, from the gate: the block before is done, and this one waits for its turn."""
        if block:
            self.model.hide(block - 1)
            self.model.settle()
            self._dispatcher.computed(self, block - 1)
        run = self._under_way
        assert run is not None
        run.go.acquire()
        if run.ended:
            raise JobEnded
        self.block = block
        self.model.ready(block)
        self.model.show(block)

    def run(self) -> None:
        """The thread."""
        self._begin()
        while (run := self._runs.get()) is not None:
            output, error = None, None
            self.block, self._under_way = -1, run
            try:
                output = self._pass(run.inputs)
            except BaseException as caught:
                error = self._named(caught)
            if self.block >= 0:
                self.model.hide(self.block)
            self.model.gate.depth = 0
            try:
                self.model.settle()
            except NarrowboatError as caught:
                error = error or caught
            self._dispatcher.finished(self, run.job, output, error)
            del output, error, run
        # What libraries do when a thread ends may spin for a lock: in the real-time class, on one core, for ever.
        realtime.leave()

    def _pass(self, inputs: tuple[Any, ...]) -> Any:
        with torch.inference_mode():
            return self.model.give(self.model.module(*self.model.take(inputs)))

    @staticmethod
    def _named(error: BaseException) -> BaseException:
        """Errors that PyTorch raises about a device, as ours."""
        return (named(error) if isinstance(error, RuntimeError) else None) or error


def _at_boundary(block: int) -> None:
    """Whichever task's thread is on its way through the network: several may share it."""
    thread = threading.current_thread()
    if isinstance(thread, Worker):
        thread.at_boundary(block)
