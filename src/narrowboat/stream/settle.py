"""After the first passes: the plan made anew from what they took, in time and in memory."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from narrowboat.errors import BudgetError, NarrowboatError, StreamedModelError
from narrowboat.machine.malloc import set_malloc_policy, trim
from narrowboat.plan.group import IN_FLIGHT
from narrowboat.plan.make import retime
from narrowboat.profile.use_trace import UseTrace
from narrowboat.quantities import format_bytes
from narrowboat.stream.memory_watch import NOISE
from narrowboat.stream.passes import PassRecord

if TYPE_CHECKING:
    from narrowboat.stream.session import Session

log = logging.getLogger("narrowboat")
# What is kept free over the memory that was seen to be taken beside the weights: holes in the heap come and go.
_MARGIN = 1.25
_MOST_LEFT, _STEP = 8 << 20, 256 << 10  # bytes
_WORTH_MOVING = 0.02  # predicted gain for which the resident set is read again
_WORTH_SPARING, _NO_LOSS = 0.1, 0.002  # or a share of the reading that a plan as quick does without


def learn(session: Session, observed: UseTrace, record: PassRecord) -> None:
    """Plan by the first real pass, where the model could not be traced in advance.

    Args:
        observed: the trace that it left.
        record: what it took.
    """
    session.prepared.trace, session.prepared.least = observed, None  # it was a guess
    taken = session.peak_bytes - session.ledger.total - sum(session.prepared.fixed_parts.values())
    session.prepared.reserve_for(taken)
    if session.peak_bytes > session.budget:
        log.warning(
            "the first pass took %s of a budget of %s: without example inputs its activations were not known",
            format_bytes(session.peak_bytes),
            format_bytes(session.budget),
        )
        session.memory.answered = session.memory.recent
    share = record.compute / max(len(observed.events), 1)
    session.prepared.step_seconds = tuple(share for _ in observed.events)
    try:
        plan, groups = session.prepared.choose(session.machine, session.budget)
    except NarrowboatError as error:
        # It ran, by loading on demand; without a plan it goes on doing so.
        log.warning("no plan for the observed pass (%s); going on with loading on demand", error)
        session.prepared.trace = None
        if isinstance(error, BudgetError):
            session.plan = replace(session.plan, minimum=error.minimum, limiter=error.limiter)
        return
    session.put_in_force(plan, groups)


def settle(session: Session, record: PassRecord) -> None:
    """Plan again from measured times and memory; move only if it is worth reading the resident set again.

    Args:
        record: of a complete pass.
    """
    prepared = session.prepared
    before, machine = session.plan, session.machine
    if record.read_busy > 0.005 and record.bytes_read:
        waiting = machine.read_latency * sum(len(before.blocks[i].holds) for i in before.streamed)
        reading = max(record.read_busy - waiting, record.read_busy / 2)
        session.machine = replace(machine, bandwidth=record.bytes_read / reading)
    # What was computed beside reading would have taken less alone.
    beside = min(max(record.read_busy - record.stall, 0.0), record.compute)
    alone = record.compute - beside * machine.contention / (1 + machine.contention)
    prepared.learn(record.step_seconds, record.compute / max(alone, 1e-9), session.machine.bandwidth)
    session.plan = replace(
        retime(before, prepared.workload()[0], session.machine), minimum=before.minimum, limiter=before.limiter
    )
    try:
        session.refuse_written()
    except StreamedModelError:
        return
    over = _correct_reserve(session)
    if not over and not session.plan.streamed:
        return
    try:
        better, groups = prepared.remake(session.machine, session.budget, session.plan)
    except BudgetError:
        _change_policy(session)
        return
    gain = 1 - better.predicted_latency / session.plan.predicted_latency
    spared = 1 - better.timing.bytes_read / max(session.plan.timing.bytes_read, 1)
    if over or gain > _WORTH_MOVING or (gain > -_NO_LOSS and spared > _WORTH_SPARING):
        session.put_in_force(better, groups)
    if over:
        session.memory.begin_anew()  # what passes take under the new plan has yet to be seen


def _change_policy(session: Session) -> None:
    """The budget has no room any more for what passes take under the policy in force: perhaps for another's."""
    prepared, before = session.prepared, session.prepared.policy
    try:
        plan, groups = prepared.choose(session.machine, session.budget)
    except BudgetError as error:
        log.warning("%s", error)
        return
    log.info("malloc policy: %s instead of %s", prepared.policy.value, before.value)
    session.put_in_force(plan, groups)
    set_malloc_policy(prepared.policy)
    session.memory.begin_anew()


def note_left_behind(session: Session) -> int:
    """Between passes: reserve what earlier plans' passes have left in the heap beyond what a session holds at rest.

    Returns:
        By how many bytes that reserve has grown.
    """
    prepared = session.prepared
    before, prepared.left_behind = prepared.left_behind, 0
    if prepared.trace is not None and session.engine.crew is None:
        trim()
        more = session.beside_weights() - prepared.at_rest
        # The program's own results and models are not the session's; small change is noise. The threads of a map leave
        # no more than was reserved for them.
        most = max(_MOST_LEFT, dict(session.plan.fixed_parts).get(IN_FLIGHT, 0))
        left = min(max(more, 0), most) // _STEP * _STEP
        prepared.left_behind = left + NOISE if left else 0  # and passes to come stir the heap once more
    return prepared.left_behind - before


def _correct_reserve(session: Session) -> bool:
    """Set the reserve beside the weights by what two passes really took; True if they took more than they may."""
    if not session.alone:
        return False  # the kernel counts for the process: nobody can say whose bytes they are
    prepared = session.prepared
    over = session.overrun()
    if over > 0:
        prepared.correct(max(over - max(note_left_behind(session), 0), 0))
        session.memory.answered = session.memory.recent
        log.warning(
            "the process took %s more than the budget in a pass; the plan gives that much back from the weights",
            format_bytes(over),
        )
        return True
    if not session.memory.answered and session.memory.certain:
        experts = session.experts.most if session.experts is not None else 0  # the cache may not have filled yet
        taken = session.memory.recent - session.plan.arena_bytes - experts
        spare = session.plan.fixed_bytes - session.plan.expert_bytes - int(taken * _MARGIN) - NOISE
        if spare > session.budget // 50:
            prepared.correct(-spare)
    return False
