"""The executor's side of the exchange: jobs are offered by the ring, their inputs lie in shared memory."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping
from typing import Any

from narrowboat.errors import NarrowboatError
from narrowboat.tasks.execute.arrivals import Wish
from narrowboat.tasks.execute.exchange import Exchange
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.wire import join, lay_down, over, spec_of, split
from narrowboat.tasks.record import JobRecord
from narrowboat.tasks.tensors import Signature, TensorSpec, packed

_SAID = 600  # characters of a cause that are told
_LARGE = 1 << 16  # bytes of outputs from which on another thread than the job's writes them
_BLOCKED = 5.0  # seconds without room for an answer, after which nobody is taken to read them

_Ended = tuple[int, int, Signature, JobRecord, Any]


class JobServer:
    """Two threads: one hears what is offered, one tells what became of it where that takes long.

    Every job that is offered has a slot in the asking side's memory, so there are never more than slots.

    Args:
        executor: runs.
        exchange: the executor's end.
        forms: what jobs take and give, by the number that comes with each.
    """

    def __init__(self, executor: Executor, exchange: Exchange, forms: Mapping[int, Signature]) -> None:
        self._executor, self._exchange = executor, exchange
        self.forms = dict(forms)
        self._ended: queue.SimpleQueue[_Ended | threading.Event] = queue.SimpleQueue()

    def start(self) -> None:
        """Begin."""
        for work in (self._hear, self._tell):
            threading.Thread(target=work, name=f"narrowboat{work.__name__}", daemon=True).start()

    def settle(self) -> None:
        """Return when all that has ended so far has been told."""
        told = threading.Event()
        self._ended.put(told)
        told.wait(_BLOCKED)

    def _hear(self) -> None:
        self._executor.enter()
        while True:
            for message in self._exchange.offers.take():
                told = json.loads(message)
                if "withdraw" in told:
                    self._executor.withdraw(told["withdraw"])
                else:
                    self._offer(told)

    def _offer(self, told: dict[str, Any]) -> None:
        ticket, name, slot = told["ticket"], told["task"], told["slot"]
        signature = self.forms[told["form"]]
        memory = self._exchange.memory

        def ended(job: JobRecord, output: Any) -> None:
            told = (ticket, slot, signature, job, output)
            if large or not self._exchange.answers.put(self._message(*told)):
                self._ended.put(told)

        large = signature.slot_bytes - signature.output_offset > _LARGE

        task = next((task for task in self._executor.tasks if task.facts.name == name), None)
        if task is not None and not _alike(task.model.input_specs, signature.inputs):
            cause = "the task has been changed meanwhile"
            ended(JobRecord(name, 0, 0, 0, outcome="skipped", cause=cause), None)
            return
        tensors = [
            over(memory, slot + offset, spec)
            for offset, spec in zip(signature.input_offsets, signature.inputs, strict=True)
        ]
        inputs = tuple(join(signature.takes, tensors))
        self._executor.offer(name, inputs, ended, Wish(ticket, told["patience"], told["rank"]))

    def _tell(self) -> None:
        while True:
            ended = self._ended.get()
            if isinstance(ended, threading.Event):
                ended.set()
                continue
            message = self._message(*ended)
            del ended
            if not self._exchange.answers.put(message, timeout=_BLOCKED):
                os._exit(1)  # whoever asked has hung: nothing to run for

    def _message(self, ticket: int, slot: int, signature: Signature, job: JobRecord, output: Any) -> bytes:
        """What is told of a job; its outputs are laid down."""
        told: dict[str, Any] = {
            "ticket": ticket,
            "outcome": job.outcome,
            "cause": job.cause[:_SAID],
            "number": job.number,
            "release_us": job.release,
            "due_us": job.due,
            "start_us": job.start,
            "finish_us": job.finish,
            "wait_us": job.wait,
        }
        if job.finish is not None:
            try:
                told["output"] = self._lay_down(output, slot, signature)
            except NarrowboatError as error:
                told["cause"], told["unsent"] = f"its output cannot be sent: {error}"[:_SAID], True
        return json.dumps(told).encode()

    def _lay_down(self, output: Any, slot: int, signature: Signature) -> Any:
        """The outputs' bytes beside the inputs; what tells them apart from the signature, or None for nothing."""
        structure, tensors = split(output)
        specs = tuple(spec_of("", tensor) for tensor in tensors)
        offsets, nbytes = packed(specs)
        if nbytes > signature.slot_bytes - signature.output_offset:
            raise NarrowboatError("it is larger than when the task was measured")
        memory = self._exchange.memory
        for tensor, spec, offset in zip(tensors, specs, offsets, strict=True):
            lay_down(tensor, memory, slot + signature.output_offset + offset, spec)
        if structure == signature.gives and _alike(specs, signature.outputs):
            return None
        return {"gives": structure, "specs": [spec.as_json() for spec in specs]}


def _alike(specs: tuple[TensorSpec, ...], others: tuple[TensorSpec, ...]) -> bool:
    return len(specs) == len(others) and all(
        a.datatype == b.datatype and a.shape == b.shape for a, b in zip(specs, others, strict=True)
    )
