"""Where a tape is cut into units: few bytes at the cuts, about equal savings between them. Pure, no torch.

Cuts go anywhere between operators, so the first stage of a convolutional network, where most bytes are, is cut as
finely as its bytes ask for.
"""

from __future__ import annotations

import heapq
import itertools

from narrowboat.train.tape.slices import cut_is_valid, home, last_reads, needed_across
from narrowboat.train.tape.structure import Tape

MOST_UNITS = 40


def choose_cuts(tape: Tape, most: int = MOST_UNITS) -> tuple[int, ...]:
    """Operators at which units begin; the first is 0 and the last is the number of operators.

    Starts from every place where a cut may be and the boundary is no larger than at its neighbours, and takes out
    cuts, smallest joint unit and largest boundary first, until ``most`` units are left.
    """
    count = len(tape.ops)
    sizes = boundary_bytes(tape)
    valid = cut_is_valid(tape)
    places = [place for place in range(1, count) if valid[place]]
    minima = [
        place
        for before, place, after in zip([None, *places], places, [*places[1:], None], strict=False)
        if (before is None or sizes[place] <= sizes[before]) and (after is None or sizes[place] <= sizes[after])
    ]
    return (0, *_thin(tape, minima, sizes, most), count)


def boundary_bytes(tape: Tape) -> list[int]:
    """For each place between operators: bytes of the storages made before it and needed from it on."""
    needed = needed_across(tape, last_reads(tape))
    change = [0] * (len(tape.ops) + 2)
    for storage in tape.storages:
        if needed[storage.number] > storage.creator:
            change[storage.creator + 1] += storage.nbytes
            change[needed[storage.number] + 1] -= storage.nbytes
    sizes, total = [], 0
    for place in range(len(tape.ops) + 1):
        total += change[place]
        sizes.append(total)
    return sizes


def _thin(tape: Tape, cuts: list[int], sizes: list[int], most: int) -> list[int]:
    weight = _weights(tape)
    before = [0]
    for each in weight:
        before.append(before[-1] + each)
    left = {place: (cuts[i - 1] if i else 0) for i, place in enumerate(cuts)}
    right = {place: (cuts[i + 1] if i + 1 < len(cuts) else len(tape.ops)) for i, place in enumerate(cuts)}

    def score(place: int) -> float:
        return float(before[right[place]] - before[left[place]] - sizes[place])

    queue = [(score(place), place) for place in cuts]
    heapq.heapify(queue)
    alive = set(cuts)
    while len(alive) + 1 > most and queue:
        old, place = heapq.heappop(queue)
        if place not in alive:
            continue
        now = score(place)
        if now > old:
            heapq.heappush(queue, (now, place))
            continue
        alive.discard(place)
        a, b = left[place], right[place]
        if a in alive:
            right[a] = b
        if b in alive:
            left[b] = a
    return sorted(alive)


def _weights(tape: Tape) -> list[int]:
    last_read = last_reads(tape)
    weight = [0] * len(tape.ops)
    for storage in tape.storages:
        if storage.saved_at:
            weight[home(tape, storage.number, storage.saved_at[0], last_read)] += storage.nbytes
    # Where much is computed and little saved, a cut is still worth having: by time, in the savings' unit.
    seconds = sum(op.seconds for op in tape.ops)
    if seconds > 0:
        scale = 0.5 * sum(weight) / seconds
        weight = [w + int(op.seconds * scale) for w, op in zip(weight, tape.ops, strict=True)]
    return weight


def unit_names(tape: Tape, cuts: tuple[int, ...]) -> list[str]:
    """What messages call the units: the modules that they begin and end in."""
    names = []
    for start, stop in itertools.pairwise(cuts):
        modules = [op.module for op in tape.ops[start:stop] if op.module]
        if not modules:
            names.append(tape.ops[start].name.rpartition("::")[2] if start < stop else "nothing")
        elif modules[0] == modules[-1]:
            names.append(modules[0])
        else:
            names.append(f"{modules[0]} to {modules[-1]}")
    return names
