"""Another budget while the session lives: between passes, or at a block boundary when less is wanted in a hurry."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from narrowboat.errors import BudgetError, StreamedModelError
from narrowboat.machine.malloc import set_malloc_policy
from narrowboat.plan import Plan
from narrowboat.profile.workload import Group
from narrowboat.quantities import format_bytes
from narrowboat.stream.settle import note_left_behind
from narrowboat.trace import Event

if TYPE_CHECKING:
    from narrowboat.stream.session import Session

log = logging.getLogger("narrowboat")


class BudgetChange:
    """A budget that was asked for and has not come yet; the last one asked for wins.

    Args:
        session: the session it changes.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._wanted: tuple[int, str] | None = None  # bytes and cause
        self._chosen: tuple[Plan, list[Group]] | None = None  # the plan for it, waiting for a boundary

    def check(self, nbytes: int) -> None:
        """Refuse a budget that the layers as they are tiled cannot do with; only streaming anew tiles others."""
        try:
            self._session.prepared.check(nbytes)
        except BudgetError as error:
            anew = self._session.plan.minimum
            if anew >= error.minimum:
                raise
            raise BudgetError(
                f"{error}; streamed anew, perhaps in smaller tiles, it could go down to {format_bytes(anew)}",
                minimum=error.minimum,
                limiter=error.limiter,
            ) from None

    def ask(self, nbytes: int, cause: str) -> None:
        """Change the budget now; or, while a pass is in progress, leave it to that pass and return.

        Args:
            nbytes: the new budget, known to be no less than the minimum.
            cause: why, for the trace.
        """
        engine = self._session.engine
        self._wanted = (nbytes, cause)
        if nbytes < self._session.budget:
            engine.on_boundary = self._at_boundary
        while self._wanted is not None:
            if engine.lock.acquire(timeout=0.02):
                try:
                    if engine.running:
                        return  # called from inside a pass
                    self.follow(asked=True)
                finally:
                    engine.lock.release()
            elif engine.running:
                return  # the thread that runs the pass sees to it

    def follow(self, chosen: tuple[Plan, list[Group]] | None = None, *, asked: bool = False) -> None:
        """Put what was asked for in force, if anything was. The caller holds the engine's lock.

        Args:
            chosen: the plan for it, if it is made already.
            asked: the one who asked is waiting for it, and is told why not.

        Raises:
            BudgetError, StreamedModelError: it cannot be, and ``asked``; else that is logged. The budget stays.
        """
        if self._wanted is None:
            return
        session = self._session
        (nbytes, cause), self._wanted = self._wanted, None
        session.engine.on_boundary, self._chosen = None, None
        start, before = time.perf_counter(), session.budget
        if not session.engine.running:
            note_left_behind(session)
        try:
            plan, groups = chosen or session.prepared.look_up(session.machine, nbytes)
            session.refuse_written()
        except (BudgetError, StreamedModelError) as error:
            if asked:
                raise
            log.warning("the budget stays %s: %s", format_bytes(before), error)
            return
        session.put_in_force(plan, groups, budget=nbytes)
        set_malloc_policy(session.prepared.policy)
        told = f"{format_bytes(before)} -> {format_bytes(nbytes)} ({cause})"
        log.info("budget %s", told)
        session.timeline.add(Event("budget", told, start, time.perf_counter(), nbytes))

    def _at_boundary(self) -> None:
        """Called between two steps of a pass, by the thread that runs it."""
        session = self._session
        if self._wanted is None:
            session.engine.on_boundary = None
            return
        if self._chosen is None or self._chosen[0].budget != self._wanted[0]:
            try:
                self._chosen = session.prepared.look_up(session.machine, self._wanted[0])
            except BudgetError:
                if session.prepared.together > 1:
                    session.engine.on_boundary = None  # it may do for one input: at the end of the sweep
                else:
                    self.follow()  # says so
                return
        stays = self._chosen[0].resident if session.ground.stays else ()
        if session.engine.may_change(stays):
            self.follow(self._chosen)
