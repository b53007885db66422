"""The dispatcher: releases jobs on time, asks the policy at every boundary, and writes down what happened.

Everything is decided under one lock. Workers compute, the loader loads; whoever reports that it has ended takes the
next decision in its own thread, so that a job that goes on does so without any change of threads. The dispatcher's own
thread releases jobs by the clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from narrowboat.errors import BudgetError, DeviceLostError, NarrowboatError
from narrowboat.tasks.execute import realtime
from narrowboat.tasks.execute.account import Account
from narrowboat.tasks.execute.arrangement import Switch
from narrowboat.tasks.execute.arrivals import NO_WISH, Arrivals, Wish
from narrowboat.tasks.execute.expiry import hopeless
from narrowboat.tasks.execute.figures import major_faults
from narrowboat.tasks.execute.gate import described
from narrowboat.tasks.execute.ground import Ground, HostGround
from narrowboat.tasks.execute.loader import Loader, Order
from narrowboat.tasks.execute.picture import picture
from narrowboat.tasks.execute.running import Endings, OnEnd, Running, Underway
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.execute.volume import Move
from narrowboat.tasks.execute.worker import Worker
from narrowboat.tasks.job import Job, TaskFacts
from narrowboat.tasks.policy.action import Action, Do, Engine, Policy, View, held_bytes
from narrowboat.tasks.record import Record

_SWAPS = (Do.SWAP_IN, Do.SWAP_OUT)
_TIDY_FROM = 0.004  # seconds without work from which on the heap's holes are given back in them
_GRACE = 5.0  # seconds that jobs under way at the end may take


class Executor:
    """Runs tasks until a time.

    Args:
        tasks: in the order of their indices.
        policy: decides.
        space: the swap space.
        budget: bytes over the baseline.
        ground: where the tasks run; None for the process's memory.
        compute_core, load_core: to pin to; None for anywhere.
        on_tick: called about ten times a second with what makes a picture of now, for whoever watches.
        keep: of jobs and segments the record holds so many, the last ones; None for all.
    """

    def __init__(
        self,
        tasks: Sequence[Running],
        policy: Policy,
        space: SwapSpace,
        *,
        budget: int,
        ground: Ground | None = None,
        compute_core: int | None = None,
        load_core: int | None = None,
        on_tick: Callable[[Callable[[], dict[str, Any]]], None] | None = None,
        keep: int | None = None,
    ) -> None:
        self.tasks, self.policy, self.space = list(tasks), policy, space
        self.ground: Ground = ground if ground is not None else HostGround()
        self.account = Account(budget, self.ground, keep)
        self.granted = realtime.RealTime()
        self.stop_requested = False
        self.begun = threading.Event()
        self._cores = realtime.cores(compute_core, load_core)
        self._on_tick = on_tick
        self._view = View(0)
        self._under: dict[Job, Underway] = {}
        self._arrivals = Arrivals(self.tasks, self._view.pending, self._under, self.account)
        self._began: dict[Engine, int] = {}
        self._order: Order | None = None
        self._failure: BaseException | None = None
        self._wake = threading.Condition()
        self._zero = self._idle_since = self._last_tick = 0
        self._ran: Job | None = None
        self._retried: tuple[Job | None, int] | None = None
        self._stirred = False  # a job has run since the heap's holes were given back
        self._switch: Switch | None = None
        self._endings = Endings()
        self._starved = False  # nothing more could be loaded: nothing is loaded ahead until something was again

    def _now(self) -> int:
        return time.monotonic_ns() // 1000 - self._zero

    def _report(self, handle: Callable[[], None]) -> None:
        """Take in that something has ended, and decide what follows. Errors are the dispatcher's, not the model's."""

        def work() -> None:
            handle()
            self._view.now = self._now()
            self._expire(self._view.now)
            self._decide()

        self._guarded(work)
        self._endings.tell()  # what follows has been started: from here on nobody's boundary is delayed
        self._guarded(self._look)

    def _look(self) -> None:
        excess = self.account.look(self._now())
        if excess > 0:  # what others have left behind is held: fewer blocks stay for another time
            self._loader.later(partial(self.space.shrink, excess))

    def _guarded(self, work: Callable[[], None]) -> None:
        with self._wake:
            if self._failure is None:
                try:
                    work()
                except BaseException as error:
                    self._failure = error
            if self._failure is not None or not self._view.pending:
                self._wake.notify()

    def computed(self, worker: Worker, block: int) -> None:
        """A block before the last is done."""
        self._report(partial(self._after_compute, None, self._now(), None))

    def finished(self, worker: Worker, job: Job, output: Any, error: BaseException | None) -> None:
        """A job has come to its end."""
        self._report(partial(self._after_compute, job, self._now(), error, output))

    def _loaded(self, order: Order) -> None:
        self._report(partial(self._after_load, order, self._now()))

    # -- the run ---------------------------------------------------------------------------------------

    def run(self, seconds: float | None, jobs: int | None = None) -> Record:
        """Release jobs for that long (or that many per task), then let those under way end.

        Args:
            seconds: None for until ``stop_requested``.
            jobs: of each task at most.
        """
        begin = self._enter(realtime.LOAD, self._cores[1])
        loader = self._loader = Loader(self.space, begin, self._loaded, self.ground)
        loader.start()
        for task in self.tasks:
            self._start_worker(task)
        self._enter(realtime.DISPATCH, self._cores[1])()
        realtime.freeze()
        majors = major_faults()
        self._zero = time.monotonic_ns() // 1000
        self.begun.set()
        wall = time.time()
        until = None if seconds is None else round(seconds * 1e6)
        try:
            self._loop(until, jobs)
        finally:
            record = self.account.record
            record.end = self._now()
            self._shut(loader)
            realtime.thaw()
            realtime.leave()
        record.jobs = sorted(record.jobs, key=lambda job: (job.release, job.task))
        record.premises = self.account.premises(
            real_time=self.granted.as_json(),
            pool_locked=self.space.pool.locked,
            major_faults=major_faults() - majors,
            clock_step_s=round(abs((time.time() - wall) - record.end / 1e6), 3),
            blocks_found_in_memory=self.space.hits,
            **self.ground.figures(),
        )
        return record

    def _start_worker(self, task: Running) -> None:
        for thread in task.model.reader.threads():
            realtime.move(self.granted, thread, realtime.LOAD, self._cores[1])
        task.worker = Worker(task.facts.name, task.model, self._enter(realtime.COMPUTE, self._cores[0]), self)
        task.worker.start()

    def _enter(self, priority: int, core: int | None) -> Callable[[], None]:
        def enter() -> None:
            realtime.enter(self.granted, priority, core)
            if priority != realtime.DISPATCH:
                self.ground.begin_thread()

        return enter

    def _loop(self, until: int | None, jobs: int | None) -> None:
        with self._wake:
            while self._failure is None:
                self._view.now = now = self._now()
                closing = self.stop_requested or (until is not None and now >= until)
                if not closing:
                    self._arrivals.release(now, until, jobs)
                upcoming = self._arrivals.upcoming(until, jobs) if not closing else None
                done = closing or (upcoming is None and self._switch is None and not self._arrivals.open)
                if done and not self._view.pending and not self._busy():
                    return
                if self._switch is not None and self._change(self._switch, now):
                    continue
                if done and until is not None and now >= until + _GRACE * 1e6:
                    return
                self._view.upcoming = upcoming.facts if upcoming is not None and self._switch is None else None
                self._expire(now)
                self._decide()
                self._endings.tell()
                self._tick(now)
                left = (
                    0.05
                    if upcoming is None or upcoming.closed_loop
                    else min((upcoming.next_release - self._now()) / 1e6, 0.05)
                )
                if left > _TIDY_FROM and self._stirred and not self._view.pending and not self._busy():
                    self._stirred = False
                    self.ground.relieve()  # costs are those of jobs that begin with a heap like that
                if left > 0:
                    self._wake.wait(left)
        raise self._failure

    def _busy(self) -> bool:
        return any(action.do is not Do.PREFETCH for action in self._view.doing.values())

    def offer(self, name: str, inputs: tuple[Any, ...], then: OnEnd, wish: Wish = NO_WISH) -> None:
        """From any thread: an input has come for a task with a queue.

        Args:
            name: of the task.
            inputs: positional arguments of one pass.
            then: is told how it ended, here or later.
            wish: of the client.
        """
        self.begun.wait()
        with self._wake:
            self._view.now = self._now()
            if self._arrivals.offer(name, inputs, then, self._view.now, wish):
                self._decide()
        self._endings.tell()

    def withdraw(self, ticket: int) -> None:
        """From any thread: nobody waits for this job any more; it ends at the next boundary."""
        with self._wake:
            for under in self._under.values():
                under.withdrawn = under.withdrawn or under.ticket == ticket
            self._view.now = self._now()
            self._expire(self._view.now)
            self._decide()
        self._endings.tell()

    def enter(self) -> None:
        """The calling thread hears what is offered: it is the dispatcher's."""
        self.begun.wait()
        self._enter(realtime.DISPATCH, self._cores[1])()

    def _expire(self, now: int) -> None:
        for job, cause in hopeless(self._view, self._under, now):
            if job.started is None:
                self._end(job, now, "skipped", cause)
            else:
                self._abort(job, cause)

    def _end(self, job: Job, now: int, outcome: str, cause: str, output: Any = None) -> None:
        self._view.pending.remove(job)
        under = self._under.pop(job)
        self.account.ended(under.told, now, outcome, cause)
        for block in range(job.computed, job.loaded):
            self._let_go(job.task, block)
        if under.then is not None:
            self._endings.add(under.then, under.told, output)

    def _let_go(self, task: TaskFacts, block: int) -> None:
        place = self._arrivals.by_name[task.name].model.places[block]
        if place is not None:
            self._loader.let_go(place)

    # -- decisions -------------------------------------------------------------------------------------

    def _decide(self) -> None:
        while True:
            self._view.free_bytes = 0 if self._starved else self.space.pool.nbytes - held_bytes(self._view)
            actions = self.policy.choose(self._view)
            if not actions:
                return
            now = self._now()  # of all that begins here: one boundary
            for action in actions:
                self._start(action, now)

    def _start(self, action: Action, now: int) -> None:
        view = self._view
        if action.do is Do.ABORT:
            assert self._order is not None
            self._order.give_up()
            view.doing[Engine.LOAD] = Action(Do.LOAD, action.task)
            self.account.counters["prefetch_aborted"] += 1
            return
        if action.do is Do.ADOPT:
            assert action.job is not None
            view.doing[Engine.LOAD] = Action(Do.LOAD, action.task, action.job)
            self.account.counters["prefetch_hit"] += 1
            self._begin(action.job, now)
            return
        if action.do is not Do.PREFETCH and view.prefetched is not None and Engine.LOAD not in view.doing:
            self._use_prefetched(action)
        engine = action.do.engine
        view.doing[engine], self._began[engine] = action, now
        task = self._arrivals.by_name[action.task.name]
        if engine is Engine.LOAD:
            swap = Move(action.nbytes, action.do is Do.SWAP_IN) if action.do in _SWAPS else None
            self._order = Order(task.model, action.block, swap)
            if action.job is not None and swap is None:
                self._begin(action.job, now)
            self._loader.order(self._order)
            return
        job = action.job
        assert job is not None and task.worker is not None
        if self._idle_since:
            self.account.overheads.append(now - self._idle_since)
            self._idle_since = 0
        self._begin(job, now)
        if action.do is Do.COMPUTE:
            job.loaded = max(job.loaded, action.block + 1)
        task.worker.compute(job, action.block, self._under[job].inputs)

    def _use_prefetched(self, action: Action) -> None:
        """At a boundary: what was loaded ahead is this job's, or nobody's."""
        assert self._view.prefetched is not None
        if action.job is not None and action.job.task is self._view.prefetched and action.job.untouched:
            action.job.loaded = 1
            self.account.counters["prefetch_hit"] += 1
        else:
            self._let_go(self._view.prefetched, 0)
            self.account.counters["prefetch_wasted"] += 1
        self._view.prefetched = None

    def _begin(self, job: Job, now: int) -> None:
        if job.started is None:
            job.started = self._under[job].told.start = now
        ran = self._ran
        if ran is not None and ran is not job and ran in self._under and not ran.finished:
            self._under[ran].told.preemptions += 1
        self._ran, self._stirred = job, True

    # -- what has ended --------------------------------------------------------------------------------

    def _after_load(self, order: Order, when: int) -> None:
        view = self._view
        action = view.doing.pop(Engine.LOAD)
        begin, job = self._began.pop(Engine.LOAD), action.job
        what = "abort" if order.given_up else action.do.value
        self.account.segment(Engine.LOAD, what, action, begin, when)
        self._order = None
        if isinstance(order.error, DeviceLostError) or (order.error is not None and action.do is Do.SWAP_OUT):
            raise order.error  # what cannot be unmapped is nobody's fault whom failing would help
        self._starved = order.error is not None
        if order.error is None:
            self.policy.ended(action, when)
        else:
            self.policy.failed(action)
        if order.given_up or (action.do in _SWAPS and order.error is None):
            pass
        elif order.error is not None:
            again = isinstance(order.error, BudgetError) and self._retried != (job, action.block)
            self._retried = (job, action.block)
            if job is not None and job in self._under and not again:  # room may have come while it failed
                self._fail(job, f"loading failed: {described(order.error)}")
        elif action.do is Do.PREFETCH:
            view.prefetched = action.task
        elif job is not None and job in self._under:
            job.loaded = max(job.loaded, action.block + 1)
            self._over(job, "load", action.block, when - begin, action.task.loads[action.block])
        else:
            self._let_go(action.task, action.block)  # its job ended meanwhile
        self._boundary(when)

    def _after_compute(self, finished: Job | None, when: int, error: BaseException | None, output: Any = None) -> None:
        """A block is done; ``finished`` is its job if that has come to its end."""
        action = self._view.doing.get(Engine.COMPUTE)
        if action is None or action.job is None or (finished is not None and action.job is not finished):
            return  # a job that was ended at a boundary has gone
        del self._view.doing[Engine.COMPUTE]
        begin, job = self._began.pop(Engine.COMPUTE), action.job
        self.account.segment(Engine.COMPUTE, action.do.value, action, begin, when)
        self.policy.ended(action, when)
        self._under[job].spent += when - begin
        if isinstance(error, DeviceLostError):
            raise error
        if error is not None:
            self._end(job, when, "failed", " ".join(described(error).split())[:300])
        else:
            job.computed = action.block + 1
            if action.do is Do.COMPUTE:
                self._let_go(job.task, action.block)
            else:
                self._loader.let_go(None)
            self._over(job, "compute", action.block, when - begin, job.task.computes[action.block])
            if finished is not None:
                late = when > job.due
                self._end(job, when, "late" if late else "done", "over its deadline" if late else "", output)
        self._boundary(when)

    def _boundary(self, when: int) -> None:
        if not self._view.doing and self._view.pending:
            self._idle_since = when

    def _over(self, job: Job, engine: str, block: int, took: int, allowed: int) -> None:
        """A segment over its budget voids the analysis; what becomes of the job is the task's own choice."""
        if took <= allowed:
            return
        self.account.overrun(job.task.name, job.number, engine, block, took, allowed)
        task = self._arrivals.by_name[job.task.name]
        computing = self._view.doing.get(Engine.COMPUTE)
        if self._under[job].spent <= task.budget or job.finished or (computing is not None and computing.job is job):
            return  # in the middle of a block nothing is ended; its own end asks again
        if task.overrun == "degrade":
            job.degraded = True
        elif task.overrun == "abort" and job in self._under:
            self._abort(job, "over its budget")

    def _abort(self, job: Job, cause: str, outcome: str = "aborted") -> None:
        worker = self._arrivals.by_name[job.task.name].worker
        if worker is not None and job.computed:
            worker.end_job()
        self._end(job, self._now(), outcome, cause)

    def _fail(self, job: Job, cause: str) -> None:
        computing = self._view.doing.get(Engine.COMPUTE)
        if computing is None or computing.job is not job:  # else the block under way ends first, and it is asked again
            self._abort(job, " ".join(cause.split())[:300], "failed")

    # -- other tasks, another budget -------------------------------------------------------------------

    def request(self, switch: Switch) -> None:
        """From another thread: at the next moment in which nothing is under way, go on with another arrangement."""
        self.begun.wait()
        with self._wake:
            switch.give_up_at = self._now() + switch.patience
            self._switch, self._arrivals.holding = switch, True
            self._wake.notify()

    def resize_pool(self, nbytes: int) -> None:
        """From another thread: lend no more than so many bytes to blocks from now on.

        Raises:
            StorageError: more is in use now.
        """

        self.begun.wait()
        self._loader.do(partial(self.space.resize, nbytes))

    def _change(self, switch: Switch, now: int) -> bool:
        """Change if nothing is under way; True if something was done about it.

        In an idle instant nothing is left of the old tasks' demand, so that each set's analysis holds on its side
        (the idle-time protocol: Tindell, Alonso, 1992). What it takes is work that the new set has to bear.
        """
        if now >= switch.give_up_at:
            self._switch, self._arrivals.holding = None, False
            switch.done("there was no moment without work in which the tasks could be changed")
            return True
        if self._view.pending or self._view.doing:
            return False
        if self._view.prefetched is not None:
            self._let_go(self._view.prefetched, 0)
            self._view.prefetched = None
        self._loader.do(lambda: None)  # it is the only one that touches the space, but for now
        self._switch, self._arrivals.holding, failed = None, False, ""
        try:
            switch.to.put_in_force(self.space, switch.before)
        except NarrowboatError as error:
            failed = str(error)
            switch.before.put_in_force(self.space, switch.to)
        arrangement = switch.before if failed else switch.to
        for task in arrangement.succeed(self._arrivals.by_name, now):
            self._start_worker(task)
        self.tasks, self.policy = list(arrangement.tasks), arrangement.policy
        self._arrivals.replace(self.tasks)
        self.ground.limit(switch.to.budget, switch.to.pool_bytes)
        self.space.shrink(
            self.ground.held() + self.space.pool.nbytes - arrangement.budget
        )  # others leave things behind
        end = self._now()
        if failed:
            switch = Switch(switch.before, switch.before, switch.allowed, switch.done)
        self.account.changed(now, end, switch.to.budget, switch.to.setup, switch.allowed)
        switch.done(failed)
        return True

    def _tick(self, now: int) -> None:
        if self._on_tick is None or now - self._last_tick < 100_000:
            return
        self._last_tick = now
        self._on_tick(lambda: picture(self._view, self.tasks, self.account, self.space, now))

    def _shut(self, loader: Loader) -> None:
        if self._order is not None:
            self._order.give_up()
        workers = [task.worker for task in self.tasks if task.worker is not None]
        for worker in workers:
            worker.end_job()
            worker.stop()
        loader.stop()
        for thread in (loader, *workers):
            thread.join(_GRACE)
