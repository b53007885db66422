"""Which operators have to run again to have a storage back: backward slices of a tape. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from narrowboat.train.tape.structure import Tape


class SliceConflictError(Exception):
    """A storage meant to be kept is needed as it was before it was changed in place.

    Attributes:
        number: the storage.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"storage {number} is changed after it is read")
        self.number = number


@dataclass(frozen=True, slots=True)
class Program:
    """A replay: operators to run, in order.

    Attributes:
        ops: their indices.
        inputs: storages that have to be there before.
        frees: for each operator: storages of the replay that nothing needs after it.
        seconds: of running these operators again, as measured.
        peak: bytes at the worst moment, of storages made by the replay and still there (``inputs`` not counted).
    """

    ops: tuple[int, ...]
    inputs: frozenset[int]
    frees: tuple[tuple[int, ...], ...]
    seconds: float
    peak: int


def home(tape: Tape, number: int, saved_at: int, last_read: list[int]) -> int:
    """The operator to whose saving a saved tensor is counted.

    Autograd saves an operator's arguments before it runs and its results after it; a storage that was just written
    and is never read again can only be a result.
    """
    storage = tape.storages[number]
    if storage.last_write == saved_at - 1 and last_read[number] < saved_at:
        return saved_at - 1
    return min(saved_at, len(tape.ops) - 1)


def last_reads(tape: Tape) -> list[int]:
    """For each storage, the last operator that reads it; -1 for none."""
    last = [-1] * len(tape.storages)
    for op in tape.ops:
        for number in op.read:
            last[number] = op.index
    return last


def program(
    tape: Tape,
    targets: Iterable[int],
    start: int,
    kept: frozenset[int] = frozenset(),
    spare: frozenset[int] = frozenset(),
) -> Program:
    """The replay that makes ``targets`` again.

    Args:
        tape: the pass.
        targets: storages wanted.
        start: storages made by operators before this one are there already.
        kept: further storages that are there, as they were at the end of the pass.
        spare: storages that stay after the replay although they are no targets (what inner replays begin with).

    Raises:
        SliceConflictError: one of ``kept`` is read as it was before its last change.
    """
    stay = set(targets) | spare
    needed = {n for n in stay if tape.storages[n].creator >= start and n not in kept}
    inputs = {n for n in stay if tape.storages[n].creator < start or n in kept}
    chosen: list[int] = []
    last = max((tape.storages[n].last_write for n in needed), default=-1)
    for index in range(last, start - 1, -1):
        op = tape.ops[index]
        made = [n for n in op.created if n in needed]
        if not made and not any(n in needed for n in op.changed):
            continue
        chosen.append(index)
        needed.difference_update(made)
        for number in op.read:
            if tape.storages[number].creator < start:
                inputs.add(number)
            elif number in kept:
                if tape.storages[number].last_write >= index:
                    raise SliceConflictError(number)
                inputs.add(number)
            else:
                needed.add(number)
    ops = tuple(reversed(chosen))
    return _with_lives(tape, ops, frozenset(inputs), stay)


def _with_lives(tape: Tape, ops: tuple[int, ...], inputs: frozenset[int], stay: set[int]) -> Program:
    last_use: dict[int, int] = {}
    for place, index in enumerate(ops):
        op = tape.ops[index]
        for number in (*op.created, *op.read):
            last_use[number] = place
    frees: list[list[int]] = [[] for _ in ops]
    for number, place in last_use.items():
        if number not in stay and number not in inputs:
            frees[place].append(number)
    live = peak = 0
    for place, index in enumerate(ops):
        live += sum(tape.storages[n].nbytes for n in tape.ops[index].created)
        peak = max(peak, live + tape.ops[index].scratch)
        live -= sum(tape.storages[n].nbytes for n in frees[place])
    return Program(
        ops=ops,
        inputs=inputs,
        frees=tuple(tuple(numbers) for numbers in frees),
        seconds=sum(tape.ops[index].replay for index in ops),
        peak=peak,
    )


def cut_is_valid(tape: Tape) -> list[bool]:
    """For each place between operators (0 .. len(ops)): no storage made before it is changed after it."""
    crossing = [0] * (len(tape.ops) + 2)
    for storage in tape.storages:
        if storage.last_write > storage.creator:
            crossing[storage.creator + 1] += 1
            crossing[storage.last_write + 1] -= 1
    valid, open_now = [], 0
    for place in range(len(tape.ops) + 1):
        open_now += crossing[place]
        valid.append(open_now == 0)
    return valid


def needed_across(tape: Tape, last_read: list[int]) -> list[int]:
    """For each storage, the last operator that reads it or to whose saving it counts; -1 for none."""
    last = list(last_read)
    for storage in tape.storages:
        for saved_at in storage.saved_at:
            last[storage.number] = max(last[storage.number], home(tape, storage.number, saved_at, last_read))
    return last


def boundary(tape: Tape, place: int, needed: list[int]) -> frozenset[int]:
    """Storages made before operator ``place`` that it or a later one needs."""
    return frozenset(s.number for s in tape.storages if s.creator < place <= needed[s.number])
