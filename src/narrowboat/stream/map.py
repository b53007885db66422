"""``Session.map``: many inputs, several of them through each block while it is in memory.

A group of inputs is pulled, taken through the model in lockstep (``stream.lockstep``), and delivered in order. Between
groups nothing is under way: the session may be called, given another budget, or closed. Where a group cannot be kept
together safely or usefully, inputs are passes of their own, one after the other: everything is resident, the model
draws random numbers or keeps something on itself from pass to pass, or the caller's thread has modes of PyTorch's
dispatcher that no other thread can be given.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch

from narrowboat.errors import (
    BudgetError,
    MapError,
    SessionClosedError,
    StorageError,
    StreamedModelError,
    UsageError,
    WeightsChangedError,
)
from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy
from narrowboat.plan.group import choose_group
from narrowboat.plan.result import Plan
from narrowboat.profile.workload import Group
from narrowboat.quantities import format_bytes
from narrowboat.stream.caller import CallerState, has_modes
from narrowboat.stream.lockstep import Crew, SweepEnded
from narrowboat.stream.passes import PassRecord
from narrowboat.stream.progress import counted
from narrowboat.stream.settle import note_left_behind
from narrowboat.stream.watch import Picture

if TYPE_CHECKING:
    from narrowboat.stream.session import Session

log = logging.getLogger("narrowboat")
MOST_ASKED = 64
_LOOKS = 16  # at so many gates of the first pass the model's own state is looked at
_PROBES = 2  # the first pass may build what later ones find
Call = Callable[[], Any]
Outcome = tuple[Any, BaseException | None]
Decision = tuple[Plan, list[Group], MallocPolicy]


class Maps:
    """What a session knows about mapping its model.

    Args:
        session: the session.

    Attributes:
        inputs: inputs that went through in groups of two or more.
        alone: inputs of maps that were passes of their own.
        sweeps: measurements of the last 256 sweeps.
        group: inputs per sweep as last decided; 1: one by one.
        why_alone: why inputs go one by one whatever is asked; empty if they do not.
        in_force: a plan with room for several inputs is in force, or was when the budget was changed.
        predicted: seconds per sweep of the plan that was last in force for one.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.inputs = 0
        self.alone = 0
        self.sweeps: deque[PassRecord] = deque(maxlen=256)
        self.swept = 0
        self.group = 1
        self.why_alone = ""
        if session.prepared.experts:
            self.why_alone = "experts are read on demand, for one pass at a time"
        elif session.ground.device is not None:
            self.why_alone = "inputs are kept together on the processor only"
        self.predicted = 0.0
        self.in_force = False
        self._probes = 0
        self._watched = False
        self._plan: Plan | None = None  # the plan that was put in force for ``_asked``, with room for ``group``
        self._asked: int | None = None
        self._open = 0
        self._crews: weakref.WeakSet[Crew] = weakref.WeakSet()

    def run(self, inputs: Iterable[Any], batch: int | None, *, progress: bool, errors: str) -> Iterator[Any]:
        """See ``Session.map``."""
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int)):
            raise UsageError(f"batch is a number of inputs or None, not {batch!r}")
        if batch is not None and not 1 <= batch <= MOST_ASKED:
            raise UsageError(f"batch must be from 1 to {MOST_ASKED}, not {batch}: every input on its way has a thread")
        if errors not in ("raise", "return"):
            raise UsageError(f"errors must be 'raise' or 'return', not {errors!r}")
        if isinstance(inputs, (torch.Tensor, Mapping)) or not isinstance(inputs, Iterable):
            raise UsageError(
                "inputs is an iterable whose elements are the arguments of one call each; "
                f"for a single call wrap it in a list: [{type(inputs).__name__.lower()}]"
            )
        session = self._session
        if session.closed:
            raise SessionClosedError(session.engine.closed)
        if batch is not None and session.plan.streamed and not self.why_alone:
            self._refuse_too_many(batch)
        total = len(inputs) if isinstance(inputs, Sized) else None
        outputs = self._deliver(iter(inputs), batch, errors)
        return counted(outputs, total) if progress else outputs

    def _refuse_too_many(self, batch: int) -> None:
        """Before anything runs: a batch for which the budget has no room, with the largest one that would do."""
        session = self._session
        try:
            session.prepared.decide(session.machine, session.budget, batch)
        except BudgetError as error:
            fits = bisect_left(range(1, batch), True, key=lambda size: self._decide(size) is None)
            raise BudgetError(
                f"the budget of {format_bytes(session.budget)} cannot hold {batch} inputs at once: "
                + (f"batch={fits} would do, or " if fits > 1 else "they can only go one by one, with batch=1; or ")
                + f"a budget of {format_bytes(error.minimum)}",
                minimum=error.minimum,
                limiter=error.limiter,
            ) from None

    def _decide(self, size: int) -> Decision | None:
        """What would be put in force for so many inputs per sweep; None if the budget cannot hold them."""
        with contextlib.suppress(BudgetError):
            return self._session.prepared.decide(self._session.machine, self._session.budget, size)
        return None

    def dismiss(self) -> None:
        """The session is closed: end the threads of every map."""
        for crew in list(self._crews):
            crew.dismiss()

    # -- groups ------------------------------------------------------------------------------------

    def _deliver(self, source: Iterator[Any], batch: int | None, errors: str) -> Generator[Any, None, None]:
        session = self._session
        crew = Crew(session.engine)
        self._crews.add(crew)
        self._open += 1
        index = 0
        try:
            while True:
                size = self._size(batch)
                calls, trouble = self._pull(source, size)
                outcomes = deque(self._sweep(crew, calls))
                del calls
                failed: list[tuple[int, BaseException]] = []
                while outcomes:
                    value, error = outcomes.popleft()
                    if error is None:
                        yield value
                    else:
                        failed.append((index, error))
                        if errors == "return":
                            yield _map_error(failed[-1:])
                    value = error = None
                    index += 1
                if failed and errors == "raise":
                    raise _map_error(failed) from failed[0][1]
                failed.clear()
                if trouble is not None:
                    if isinstance(trouble, StopIteration):
                        return
                    raise trouble
        finally:
            self._open -= 1
            _surely(crew.dismiss)
            _surely(self._restore)

    def _pull(self, source: Iterator[Any], size: int) -> tuple[list[Call], Exception | None]:
        """The next inputs, as calls; and what ended them, if anything did."""
        calls: list[Call] = []
        while len(calls) < size:
            try:
                calls.append(self._call(next(source)))
            except Exception as error:  # StopIteration among them: what was pulled before is not lost
                return calls, error
        return calls, None

    def _call(self, item: Any) -> Call:
        module = self._session.prepared.module
        if isinstance(item, torch.Tensor):
            return lambda: module(item)
        if isinstance(item, tuple):
            return lambda: module(*item)
        if isinstance(item, Mapping):
            return lambda: module(**item)

        def refuse() -> Any:
            raise UsageError(
                "an input is a tuple of positional arguments, a dict of keyword arguments, or a tensor, "
                f"not {type(item).__name__}"
            )

        return refuse

    def _sweep(self, crew: Crew, calls: list[Call]) -> list[Outcome]:
        session = self._session
        if session.closed:
            raise SessionClosedError(session.engine.closed)
        together = self._together()
        watching = together and not self._watched
        if not together or not calls or (len(calls) == 1 and not watching):
            self.alone += len(calls)
            return [_alone(call) for call in calls]
        engine, prepared = session.engine, session.prepared
        state = CallerState.capture()
        outcomes: list[Outcome]
        with engine.lock:
            written = prepared.trace.written if prepared.trace is not None else ()
            before = Picture(prepared.module, [prepared.weights[i] for i in sorted(written)])
            drawn = torch.get_rng_state()
            seen = self._look_at_gates(crew, before) if watching else []
            prepared.together = len(calls)
            try:
                outcomes = crew.sweep([lambda call=call: state.run(call) for call in calls])  # type: ignore[misc]
            finally:
                prepared.together = 1
                crew.on_gate = None
            change = before.change()
            random = not torch.equal(drawn, torch.get_rng_state())
            if watching:
                self._conclude(change or "".join(seen[:1]), random)
            if len(calls) == 1:
                self.alone += 1
            elif change or random:
                self._undo(before, change, drawn)
                outcomes = [(None, SweepEnded()) for _ in calls]
            else:
                self._note(engine.record)
        if crew.broken is not None:
            log.info("a sweep was given up, its inputs go one by one: %s", crew.broken)
        for _, error in outcomes:
            if error is not None and not isinstance(error, (Exception, SweepEnded)):
                raise error  # the model's own SystemExit, say
            if isinstance(error, (StreamedModelError, WeightsChangedError)) and error is not crew.broken:
                raise error
        # What a sweep could not give an input, a pass of its own may.
        again = [isinstance(error, (SweepEnded, BudgetError, StorageError)) for _, error in outcomes]
        if len(calls) > 1:
            self.alone += sum(again)
            self.inputs += len(calls) - sum(again)
        return [_alone(call) if retry else out for call, retry, out in zip(calls, again, outcomes, strict=True)]

    # -- whether to keep inputs together -------------------------------------------------------------

    def _together(self) -> bool:
        """Whether inputs may go through together, as far as is known now."""
        session = self._session
        trace = session.prepared.trace
        return not (self.why_alone or trace is None or session.engine.observed is not None or has_modes())

    def _look_at_gates(self, crew: Crew, before: Picture) -> list[str]:
        """Have the model's state looked at in the middle of the pass; returns where findings will be."""
        found: list[str] = []
        gates = len({first for block in self._session.plan.blocks for first, _ in block.holds})
        stride = max(gates // _LOOKS, 1)
        count = 0

        def look() -> None:
            nonlocal count
            count += 1
            if count % stride == 0 and not found:
                found.extend(filter(None, [before.change()]))

        crew.on_gate = look
        return found

    def _conclude(self, change: str, random: bool) -> None:
        """After a pass that was watched: may several go together?"""
        self._probes += 1
        if random:
            self.why_alone = "the model draws random numbers, in an order that lockstep would change"
        elif change and self._probes >= _PROBES:
            self.why_alone = f"the model keeps something on itself during a pass ({change})"
        self._watched = not change or self._probes >= _PROBES
        if self.why_alone:
            log.info("map: inputs go one by one: %s", self.why_alone)

    def _undo(self, before: Picture, change: str, drawn: torch.Tensor) -> None:
        """A sweep turned out to be of a model whose passes see each other: as if it had not been."""
        torch.set_rng_state(drawn)
        self.why_alone = f"the model keeps something on itself ({change})" if change else "the model draws at random"
        log.warning("map: %s; inputs go one by one from here on", self.why_alone)
        if change and not before.restore():
            raise StreamedModelError(
                f"{change} was written in place while several inputs were on their way through the model; their "
                "results would mix: use session.map(..., batch=1), and put the model's state right first"
            )

    # -- the plan ------------------------------------------------------------------------------------

    def _size(self, batch: int | None) -> int:
        """How many inputs the next group has; the plan in force has room for them."""
        session = self._session
        if session.closed:
            raise SessionClosedError(session.engine.closed)
        settled = session.settled or batch is not None  # the first passes of a session measure, for its plan
        if batch == 1 or not self._together() or not self._watched or not settled:
            return 1
        with session.engine.lock:
            session.engine.mend()
            if session.plan is self._plan and self._asked == batch:
                return self.group
            if not session.plan.streamed:
                self.group = 1
                return 1
            start = time.perf_counter()
            self.group, chosen = self._choose(batch)
            self._asked = batch
            if chosen is not None:
                self.in_force = True
                self._put_in_force(*chosen)
            self._plan, self.predicted = session.plan, session.plan.predicted_latency
            log.info("map: %d inputs per sweep, chosen in %.0f ms", self.group, (time.perf_counter() - start) * 1e3)
            return self.group

    def _choose(self, batch: int | None) -> tuple[int, Decision | None]:
        plans: dict[int, Decision] = {}

        def seconds(size: int) -> float | None:
            decided = self._decide(size)
            if decided is None:
                return None
            plans[size] = decided
            return decided[0].predicted_latency

        if batch is None:
            size = choose_group(seconds)
        else:  # it fitted when it was asked for; the budget may have become smaller since
            size = next((n for n in range(batch, 1, -1) if seconds(n) is not None), 1)
        return size, plans[size] if size > 1 else None

    def _put_in_force(self, plan: Plan, groups: list[Group], policy: MallocPolicy) -> None:
        session = self._session
        try:
            session.prepared.policy = policy
            session.put_in_force(plan, groups)
            set_malloc_policy(policy)
        except Exception:
            raise
        except BaseException:
            session.engine.torn = True
            raise

    def _restore(self) -> None:
        """The last map is over: the plan for single passes again."""
        session = self._session
        if session.engine.crew is not None and session.engine.crew.is_member():
            return  # an abandoned iterator, collected in the middle of another map's sweep: the lock is not to be had
        with session.engine.lock:
            if self._open or session.closed or not self.in_force:
                return
            session.engine.mend()
            self._plan, self.in_force = None, False
            note_left_behind(session)
            try:
                self._put_in_force(*session.prepared.decide(session.machine, session.budget))
            except BudgetError as error:  # passes took more than was thought; what is in force holds a single one
                log.warning("the plan of the map stays in force: %s", error)

    def _note(self, record: PassRecord) -> None:
        """A sweep is over: measurements, and more room per input if it took more than the budget."""
        session = self._session
        record.forget_details()
        self.sweeps.append(record)
        self.swept += 1
        over = session.note_sweep()
        if over:
            session.prepared.in_flight_correction += -(-over // max(record.inputs - 1, 1))
            self._asked = 0  # decide anew
            log.warning("a sweep took %s more than the budget; the next ones leave more room", format_bytes(over))


def _surely(task: Callable[[], None]) -> None:
    """Do ``task``, and again if Ctrl-C strikes in it; threads must not be left behind."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            task()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _alone(call: Call) -> Outcome:
    """A pass of its own, in the caller's thread."""
    try:
        return call(), None
    except (StreamedModelError, WeightsChangedError):
        raise  # not of this input: the next would meet it too
    except Exception as error:
        return None, error


def _map_error(failed: list[tuple[int, BaseException]]) -> MapError:
    index, cause = failed[0]
    more = f" (as did {', '.join(str(i) for i, _ in failed[1:])})" if len(failed) > 1 else ""
    told = f"input {index} failed{more}: {type(cause).__name__}: {cause}"
    error = MapError(told, index=index, indices=tuple(i for i, _ in failed))
    error.__cause__ = cause
    return error
