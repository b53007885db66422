"""From a set that runs to another: may it be changed without anybody missing a deadline, and how."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from narrowboat.errors import AdmissionError, NarrowboatError
from narrowboat.quantities import format_bytes
from narrowboat.tasks.analysis.memory import largest_pair
from narrowboat.tasks.spec.schema import TaskSpec, network_key
from narrowboat.tasks.task_set import TaskSet
from narrowboat.tasks.words import format_exactly

# What laying a network out takes beside reading its resident weights: assumed, and generously. In all, 6 to 94 ms were
# seen for the robot where up to 330 ms were foreseen; what a change really took is held against what it may.
_PER_NETWORK, _PER_UNIT = 4_000, 250  # microseconds
_POOL_RATE = 1 << 10  # bytes per microsecond by which the pool grows, at least; 2.9 KiB was seen
_SLOW = 0.01  # microseconds per byte where no unit says how long reading takes
_ROUNDS = 4  # of taking bytes from what is resident, until new networks can warm up beside it
_SKELETON = 2 << 20  # bytes of Python objects that opening a network leaves, beyond what it counts


@dataclass(frozen=True)
class Transition:
    """A change that has been found to hold.

    Attributes:
        to: the new set, with its blocks and pins.
        warm_setup: what is assumed while new networks warm up as best effort; None where there are none.
        pause: microseconds that it should take at an instant without work.
        allowed: that the new tasks can bear.
        prepare_bytes: that opening new networks takes beside what runs.
        room: the set that runs with so much less for its weights, where that takes more than is free: it comes first.
    """

    to: TaskSet
    warm_setup: dict[str, Any] | None
    pause: int
    allowed: int
    prepare_bytes: int = 0
    room: Transition | None = None


def plan_change(now: TaskSet, new: TaskSet) -> Transition:
    """How to go from ``now``, which runs, to ``new``.

    The change takes place at an instant without work, so that nothing of the old tasks is left in the new one's busy
    intervals. What it takes itself is extra work at the start of such an interval: it must not exceed the overrun that
    the new set tolerates (research T8). Everything is allocated anew if that can be done so, else the networks that
    there are stay as they are.

    Raises:
        AdmissionError: the new set is refused, or the change would cost a deadline; nothing has changed.
    """
    new.refuse_described()
    for field in ("device", "chunk"):
        if getattr(now.settings, field) != getattr(new.settings, field):
            raise AdmissionError(f"{field} cannot be changed while tasks run: stop the run and start it anew")
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if new.settings.device == "cpu" and new.settings.budget > have:
        raise AdmissionError(
            f"the budget is {format_bytes(new.settings.budget)}, and this machine has {format_bytes(have)} in all"
        )
    for core in ("compute_core", "load_core"):
        if getattr(now.settings, core) != getattr(new.settings, core):
            raise AdmissionError(f"{core} cannot be changed while tasks run: stop the run and start it anew")
    refused: AdmissionError | None = None
    for option in (lambda: new, lambda: _roomier(now, new), lambda: _keeping(now, new)):
        found = option()
        if found is None:
            continue
        try:
            return _judge(now, found)
        except AdmissionError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _judge(now: TaskSet, new: TaskSet) -> Transition:
    verdict = new.require_runnable()
    assert verdict.tolerance is not None
    fresh = _fresh(now, new)
    allowed, warm_setup, prepare, room = verdict.tolerance, None, 0, None
    if fresh:
        names = {spec.name for spec in fresh}
        warming = _warming(new, names)
        try:
            least = warming.require().tolerance
        except AdmissionError as error:
            raise AdmissionError(f"while {', '.join(sorted(names))} warm up: {error}", error.verdict) from None
        allowed = min(allowed, least if least is not None else 0)
        warm_setup = warming.setup(warming.facts())
        for told in warm_setup["tasks"]:
            told["closed_loop"] = told["name"] in names  # one job after the other, whatever the contract
        opened = [task for task in new.costed if task.name in names]
        skeleton = _SKELETON if new.settings.device == "cpu" else 0
        prepare = sum(task.fixed_bytes - task.staying_bytes + skeleton for task in opened)
        if prepare > now.settings.budget - now.admit().needed_bytes:
            room = _make_room(now, prepare, sorted(names))
    pause = _pause(room.to if room is not None else now, new)
    if pause > allowed:
        raise AdmissionError(
            f"changing the tasks would keep them waiting for {format_exactly(pause)}, and their deadlines bear "
            f"{format_exactly(allowed)}: stop the run and start it anew, or change it in smaller steps",
            verdict,
        )
    return Transition(new, warm_setup, pause, allowed, prepare, room)


def _fresh(now: TaskSet, new: TaskSet) -> list[TaskSpec]:
    """Tasks whose networks are not there yet."""
    known = {network_key(task) for task in now.settings.tasks}
    return [spec for spec in new.settings.tasks if network_key(spec) not in known]


def _warming(new: TaskSet, names: Collection[str]) -> TaskSet:
    """The new set while these tasks are promised nothing yet, laid out as it will be."""
    tasks = tuple(
        spec.model_copy(update={"guarantee": "best-effort"}) if spec.name in names else spec
        for spec in new.settings.tasks
    )
    return new.with_settings(new.settings.model_copy(update={"tasks": tasks}), new.allocation.tasks)


def _roomier(now: TaskSet, new: TaskSet) -> TaskSet | None:
    """The new set with fewer bytes resident, where new networks take more while they warm up: all may preempt them."""
    names = {spec.name for spec in _fresh(now, new)}
    budget, found = new.settings.budget, new
    for _ in range(_ROUNDS if names else 0):
        over = _warming(found, names).admit().needed_bytes - new.settings.budget
        if over <= 0:
            return None if found is new else found
        budget -= over
        try:
            less = new.with_settings(new.settings.model_copy(update={"budget": budget}))
            found = new.with_settings(new.settings, less.allocation.tasks)
        except NarrowboatError:
            return None
    return None


def _make_room(now: TaskSet, nbytes: int, names: Sequence[str]) -> Transition:
    """The set that runs, in so many bytes less."""
    left = now.settings.budget - nbytes
    try:
        smaller = now.with_settings(now.settings.model_copy(update={"budget": left}))
        return _judge(now, smaller)
    except NarrowboatError as error:
        raise AdmissionError(
            f"opening {', '.join(names)} beside the tasks that run takes {format_bytes(nbytes)}, and these do not do "
            f"with {format_bytes(left)}: raise the budget first ({error})"
        ) from error


def _keeping(now: TaskSet, new: TaskSet) -> TaskSet | None:
    """The new set with the networks that there are left as they lie; None if that leaves too little memory."""
    there = {network_key(task.spec): task for task in now.allocation.tasks}
    kept = []
    for task in new.costed:
        old = there.get(network_key(task.spec))
        if old is not None and old.network == task.network:
            kept.append(replace(task, pins=old.pins, ends=old.ends))
        else:
            room = largest_pair([unit.nbytes for unit in task.units])
            kept.append(task.cut(room=room, overhead=new.settings.overhead) or task)
    made = new.with_settings(new.settings, kept)
    return made if made.admit().needed_bytes <= new.settings.budget else None


def _pause(now: TaskSet, new: TaskSet) -> int:
    """Microseconds to lay out anew what lies differently, by the worst times of reading each unit."""
    there = {network_key(task.spec): (task.ends, task.pins) for task in now.allocation.tasks}
    seen: set[tuple[str, str | None]] = set()
    total = _PER_NETWORK + max(new.pool_bytes - now.pool_bytes, 0) // _POOL_RATE
    for task in new.allocation.tasks:
        key = network_key(task.spec)
        if key in seen or there.get(key) == (task.ends, task.pins):
            continue
        seen.add(key)
        large = [unit.load / unit.nbytes for unit in task.units if unit.nbytes >= 1 << 20]
        staying = task.staying_bytes * max(large, default=_SLOW)
        total += round(staying) + sum(task.units[unit].load for unit in task.pins)
        total += _PER_NETWORK + _PER_UNIT * len(task.units)
    return total
