"""Jobs offered from outside the executor: their tensors written into shared memory, and what became of them."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from narrowboat.errors import ExecutorError, UsageError
from narrowboat.tasks.contract import Bucket
from narrowboat.tasks.costed import arrival_of, slots_of
from narrowboat.tasks.execute.exchange import Areas, Exchange, Slots
from narrowboat.tasks.record import beyond
from narrowboat.tasks.spec.schema import TaskSpec
from narrowboat.tasks.tensors import Signature, TensorSpec, packed

LOST = "lost"  # the outcome of jobs whose executor has gone


@dataclass(frozen=True)
class Delivery:
    """What became of a job. Times in microseconds of the run.

    Attributes:
        outcome: "done", "late", "skipped", "aborted", "failed", or "lost" with the executor.
        cause: why it is not "done"; empty otherwise.
        release: when it came.
        due: its deadline.
        start: when it began; None if it never did.
        finish: when it ended; None if it did not.
        outputs: its tensors with their bytes, which are the receiver's own; empty without a finish.
        gives: how they lie in the output; None without a finish.
        wait: where it came beyond its contract, microseconds until the next may come.
    """

    outcome: str
    cause: str
    release: int = 0
    due: int = 0
    start: int | None = None
    finish: int | None = None
    outputs: tuple[tuple[TensorSpec, bytes], ...] = ()
    gives: Any = None
    wait: int = 0


Then = Callable[[Delivery], None]


@dataclass(frozen=True)
class Form:
    """How jobs of a task are written.

    Attributes:
        number: by which the executor knows it.
        signature: of the task.
        slots: in shared memory.
        bucket: holds whoever offers to the contract already here: what is beyond it costs the executor nothing.
    """

    number: int
    signature: Signature
    slots: Slots
    bucket: Bucket


class Offers:
    """The asking side of an exchange. Any thread may offer; one collects.

    Args:
        exchange: with the executor.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self._areas = exchange, Areas(exchange)
        self._forms: dict[str, Form] = {}
        self._numbers, self._tickets = itertools.count(), itertools.count()
        self._open: dict[int, tuple[Form, int, Then]] = {}
        self._lock = threading.Lock()
        self._over: ExecutorError | None = None

    def forms_for(self, specs: Sequence[TaskSpec], signatures: Mapping[str, Any]) -> dict[str, Form]:
        """Forms of the tasks that take inputs from a queue; those that stay the same are used again.

        Raises:
            UsageError: what a task takes or gives cannot be sent.
        """
        made = {}
        for spec in specs:
            if spec.input is None or spec.input.queue is None:
                continue
            told = signatures[spec.name]
            if "error" in told:
                raise UsageError(f"task {spec.name!r} cannot take inputs from a queue: {told['error']}")
            signature, known = Signature.from_json(told), self._forms.get(spec.name)
            bucket = Bucket(spec.step, arrival_of(spec).jitter)
            if known is not None:
                bucket.go_on_from(known.bucket)
            if known is not None and known.signature == signature and known.slots.count == slots_of(spec):
                made[spec.name] = replace(known, bucket=bucket)
            else:
                slots = self._areas.make(signature.slot_bytes, slots_of(spec))
                made[spec.name] = Form(next(self._numbers), signature, slots, bucket)
        return made

    def put_in_force(self, forms: dict[str, Form]) -> None:
        """Those that were and are not any more give their memory back when their last job has ended."""
        with self._lock:
            before, self._forms = self._forms, forms
            self._retire_all(before, forms)

    def give_up(self, forms: Mapping[str, Form]) -> None:
        """Forms that were made and will not be in force."""
        with self._lock:
            self._retire_all(forms, self._forms)

    def _retire_all(self, forms: Mapping[str, Form], but: Mapping[str, Form]) -> None:
        kept = {form.number for form in but.values()}
        for form in forms.values():
            if form.number not in kept:
                self._areas.retire(form.slots)

    def signature(self, task: str) -> Signature:
        """Of a task that takes inputs from a queue."""
        return self._forms[task].signature

    def offer(
        self,
        task: str,
        write: Callable[[memoryview, Sequence[int]], None],
        then: Then,
        *,
        patience: int | None = None,
        rank: int = 0,
    ) -> int:
        """One job, now.

        Args:
            task: its name.
            write: is given the memory, and where each input of the signature begins in it.
            then: told what became of it: by whoever collects, or at once.
            patience: microseconds after which the answer is of no use.
            rank: among jobs that are promised nothing, smaller first.

        Returns:
            A ticket to withdraw it with.
        """
        now = time.monotonic_ns() // 1000
        with self._lock:
            ticket = next(self._tickets)
            form, slot, wait = self._forms.get(task), None, 0
            if form is not None and self._over is None:
                wait = form.bucket.wait(now)
                slot = form.slots.take() if not wait else None
            if form is not None and slot is not None:
                form.bucket.take(now)
                self._open[ticket] = form, slot, then
        if form is None or slot is None:
            then(self._refusal(task, form, wait))
            return ticket
        try:
            write(self._exchange.memory, [slot + offset for offset in form.signature.input_offsets])
        except BaseException:
            self._settle(ticket)
            raise
        told = {"ticket": ticket, "task": task, "form": form.number, "slot": slot, "patience": patience, "rank": rank}
        if not self._exchange.offers.put(json.dumps(told).encode()) and self._settle(ticket):
            then(Delivery("skipped", "the executor does not keep up"))
        return ticket

    def _refusal(self, task: str, form: Form | None, wait: int) -> Delivery:
        if self._over is not None:
            return Delivery(LOST, str(self._over))
        if form is None:
            return Delivery("skipped", f"no task {task!r} takes inputs now")
        wait = wait or form.bucket.period  # without: as many are under way as may be
        return Delivery("skipped", beyond(wait), wait=wait)

    def withdraw(self, ticket: int) -> None:
        """Nobody waits for it any more; it ends at the next block boundary if it has begun. ``then`` is called yet."""
        if ticket in self._open:
            self._exchange.offers.put(json.dumps({"withdraw": ticket}).encode())

    def collect(self) -> None:
        """Tell what has become of jobs meanwhile."""
        for message in self._exchange.answers.take():
            told = json.loads(message)
            if told["ticket"] not in self._open:
                continue  # it was given up as lost when the executor went
            form, slot, then = self._open[told["ticket"]]
            outputs, gives = self._read(told, form, slot)
            self._settle(told["ticket"])
            times = (told["release_us"], told["due_us"], told["start_us"], told["finish_us"])
            outcome = "failed" if told.get("unsent") else told["outcome"]
            then(Delivery(outcome, told["cause"], *times, outputs, gives, told["wait_us"]))

    def _read(
        self, told: Mapping[str, Any], form: Form, slot: int
    ) -> tuple[tuple[tuple[TensorSpec, bytes], ...], Any]:
        if "output" not in told:
            return (), None
        specs, gives = form.signature.outputs, form.signature.gives
        if told["output"] is not None:
            specs, gives = tuple(map(TensorSpec.from_json, told["output"]["specs"])), told["output"]["gives"]
        begin = slot + form.signature.output_offset
        memory = self._exchange.memory
        return tuple(
            (spec, bytes(memory[begin + offset : begin + offset + spec.nbytes]))
            for spec, offset in zip(specs, packed(specs)[0], strict=True)
        ), gives

    def _settle(self, ticket: int) -> bool:
        """Its slot is free again; False if somebody has done that."""
        with self._lock:
            found = self._open.pop(ticket, None)
            if found is None:
                return False
            found[0].slots.give(found[1])
            return True

    def end(self, error: ExecutorError) -> None:
        """The executor has gone: what is open is lost, and so is what is offered from now on."""
        with self._lock:
            self._over = self._over or error
            waiting, self._open = list(self._open.values()), {}
        for _, _, then in waiting:
            then(Delivery(LOST, str(error)))
