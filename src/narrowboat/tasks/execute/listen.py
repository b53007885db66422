"""What a run is told while it runs: inputs for queues, other tasks or another budget, and to stop."""

from __future__ import annotations

import queue
import sys
import threading
from typing import TYPE_CHECKING, Any

from narrowboat.errors import NarrowboatError, UsageError
from narrowboat.tasks.execute.arrangement import Arrangement
from narrowboat.tasks.execute.change import Changer
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.lines import Lines
from narrowboat.tasks.execute.load_models import Loaded
from narrowboat.tasks.execute.wire import from_wire, shapes, to_wire
from narrowboat.tasks.record import JobRecord

if TYPE_CHECKING:
    from narrowboat.tasks.execute.child import Pipe

_UNTOLD = 64  # answers that may wait to be told, after which their outputs are dropped
Answer = tuple[int, JobRecord, Any]


class Listener(threading.Thread):
    """Reads stdin; whoever asked for the run is gone when that ends, and the run ends too.

    Args:
        executor: runs.
        arrangement: that it began with.
        loaded: the networks.
        pipe: to whoever asked.
    """

    def __init__(self, executor: Executor, arrangement: Arrangement, loaded: Loaded, pipe: Pipe) -> None:
        super().__init__(name="narrowboat-listener", daemon=True)
        self._executor, self._pipe = executor, pipe
        self._changer = Changer(executor, arrangement, loaded, pipe)
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def run(self) -> None:
        """The thread."""
        threading.Thread(target=self._tell_answers, name="narrowboat-answers", daemon=True).start()
        for told, payload in Lines(sys.stdin.buffer).read():
            if told["do"] == "stop":
                break
            if told["do"] == "offer":
                self._offer(told, payload)
            elif told["do"] == "change":
                self._changer.start(told)
        self._executor.stop_requested = True

    def _offer(self, told: dict[str, Any], payload: bytes) -> None:
        ticket, name = told["ticket"], told["task"]

        def ended(job: JobRecord, output: Any) -> None:
            self._answers.put((ticket, job, output if self._answers.qsize() < _UNTOLD else None))

        try:
            inputs = tuple(from_wire(told["inputs"], payload))
            self._refuse_others(name, inputs)
        except NarrowboatError as error:
            ended(JobRecord(name, 0, 0, 0, outcome="failed", cause=str(error)), None)
            return
        self._executor.offer(name, inputs, ended)

    def _refuse_others(self, name: str, inputs: tuple[Any, ...]) -> None:
        """Inputs of another shape cost something else than was analysed; they are not let in.

        Raises:
            UsageError: they are not like the example's.
        """
        task = next((task for task in self._executor.tasks if task.facts.name == name), None)
        if task is None:
            return  # the executor says so
        given, wanted = shapes(inputs), shapes(task.model.inputs)
        if given != wanted:
            raise UsageError(f"the task was analysed for inputs {wanted}, and these are {given}")

    def _tell_answers(self) -> None:
        while True:
            ticket, job, output = self._answers.get()
            cause, structure, payload = job.cause, None, b""
            try:
                structure, payload = to_wire(output)
            except NarrowboatError as error:
                cause = cause or f"its output cannot be sent: {error}"
            self._pipe.tell(
                "answer",
                payload,
                ticket=ticket,
                outcome=job.outcome,
                cause=cause,
                number=job.number,
                release_us=job.release,
                due_us=job.due,
                finish_us=job.finish,
                output=structure,
            )
