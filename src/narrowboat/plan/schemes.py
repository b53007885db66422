"""Other people's plans, for comparison and ablation: what the same bytes give when they are spent another way.

=================  ==================================================================================================
scheme             what it does
=================  ==================================================================================================
``swapnet``        n blocks of consecutive layers, two in memory at a time, cut so that the residual delay is least
                   (SwapNet; the recurrence is that of ``timing`` with two slots); nothing is resident
``first-resident`` the first layers stay in for as long as they fit, the others share a window (accelerate's
                   ``device_map``, with our prefetching)
``window``         nothing is resident, all bytes are window (prefetching alone)
=================  ==================================================================================================

A scheme changes the holds of a workload's blocks where it swaps coarser than the network is cut, and says which blocks
are resident and where the others lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

from narrowboat.errors import UsageError
from narrowboat.plan.layout import peak_held, place
from narrowboat.plan.model import OBJECTIVES, Block, Machine, Workload

Decision = tuple[Workload, frozenset[int], tuple[int, ...], list[int]]  # resident, streamed, their offsets
_ATOMS = 48
_Schedule = tuple[float, float, float, tuple[int, ...]]
Scheme = Callable[[Workload, Machine, int], Decision | None]


def first_resident(workload: Workload, machine: Machine, room: int) -> Decision | None:
    """Keep the first layers, stream the rest through the smallest window that will do; None if nothing fits."""
    blocks = workload.blocks
    kept = list(accumulate((block.nbytes for block in blocks), initial=0))
    for count in range(len(blocks), -1, -1):
        if kept[count] > room or kept[count] + peak_held(blocks[count:])[0] > room:
            continue
        places = place(blocks[count:], room - kept[count])
        if places is not None:
            return workload, frozenset(range(count)), tuple(range(count, len(blocks))), places
    return None


def window_only(workload: Workload, machine: Machine, room: int) -> Decision | None:
    """Nothing resident; None if the blocks cannot be laid."""
    places = place(workload.blocks, room)
    return None if places is None else (workload, frozenset(), tuple(range(len(workload.blocks))), places)


def swapnet(workload: Workload, machine: Machine, room: int) -> Decision | None:
    """SwapNet's partition with m = 2; None if no two neighbouring layers fit.

    The chain of blocks is cut by dynamic programming over (start of the last part, its end), keeping for each the
    partial schedules that none of the others dominates in (end of reading, end of computing); exact for the recurrence

        in_done[i] = max(in_done[i-1], ex_done[i-2]) + read[i]
        ex_done[i] = max(ex_done[i-1], in_done[i]) + compute[i]

    Parts lie at the two ends of the memory in turn, so that two neighbours never meet. On a device the cuts are made
    for whichever channel takes longer over a part, the host cache taken to hold its share of every part.
    """
    room = min(room, workload.weight_bytes)  # parts lie against both ends, and the arena is no longer than that
    used = [i for i, block in enumerate(workload.blocks) if block.holds]
    chain = sorted(used, key=lambda i: workload.blocks[i].holds[0])
    unused = [i for i, block in enumerate(workload.blocks) if not block.holds]  # they have a place, and take none
    if any(workload.blocks[i].nbytes > room for i in unused):
        return None
    if not chain:
        return workload, frozenset(), tuple(unused), [0] * len(unused)
    # Cut only between atoms: the search is cubic in them.
    stride = -(-len(chain) // _ATOMS)
    atoms = [chain[at : at + stride] for at in range(0, len(chain), stride)]
    count = len(atoms)
    size = list(accumulate((sum(workload.blocks[i].nbytes for i in atom) for atom in atoms), initial=0))
    read = list(accumulate((sum(workload.blocks[i].read_bytes for i in atom) for atom in atoms), initial=0))
    elapsed = list(accumulate(workload.step_seconds, initial=0.0))
    starts = [workload.blocks[atom[0]].holds[0][0] for atom in atoms] + [len(workload.step_seconds)]
    lasts = [max(hold[1] for i in atom for hold in workload.blocks[i].holds) for atom in atoms]

    missed = max(1 - machine.host_room / max(size[-1], 1), 0.0)

    def reading(a: int, b: int) -> float:
        seconds = (read[b] - read[a]) / machine.bandwidth + machine.read_latency
        if not machine.copy_bandwidth:
            return seconds
        return max(seconds * missed, (size[b] - size[a]) / machine.copy_bandwidth + machine.copy_latency)

    def computing(a: int, b: int) -> float:
        return elapsed[starts[b]] - elapsed[starts[a]]

    # ends[b][a]: schedules whose last part is chain[a:b]; (in_done, ex_done before it, ex_done, cuts).
    ends: list[dict[int, list[_Schedule]]] = [{} for _ in range(count + 1)]
    for b in range(1, count + 1):
        if size[b] <= room:
            into = reading(0, b)
            ends[b][0] = [(into, 0.0, into + computing(0, b), (0,))]
    for b in range(1, count + 1):
        for a, schedules in ends[b].items():
            last = max(lasts[a:b])
            for c in range(b + 1, count + 1):
                if size[c] - size[a] > room:
                    break
                if c < count and starts[c] <= last:
                    continue  # the part that begins there would take the place of one still held
                for in_done, before, done, cuts in schedules:
                    into = max(in_done, before) + reading(b, c)
                    entry = (into, done, max(done, into) + computing(b, c), (*cuts, b))
                    _keep(ends[c].setdefault(b, []), entry)
    final = [entry for schedules in ends[count].values() for entry in schedules]
    if not final:
        return None
    cuts = (*min(final, key=lambda entry: entry[2])[3], count)
    blocks = list(workload.blocks)
    offsets = [0] * len(blocks)
    for part, (a, b) in enumerate(pairwise(cuts)):
        part_of = [i for atom in atoms[a:b] for i in atom]
        first = workload.blocks[part_of[0]].holds[0][0]
        last = max(hold[1] for i in part_of for hold in workload.blocks[i].holds)
        at = 0 if part % 2 == 0 else room - (size[b] - size[a])
        for i in part_of:
            blocks[i] = _held_over(blocks[i], first, last)
            offsets[i] = at
            at += blocks[i].nbytes
    streamed = (*chain, *unused)
    return replace(workload, blocks=tuple(blocks)), frozenset(), streamed, [offsets[i] for i in streamed]


def _held_over(block: Block, first: int, last: int) -> Block:
    return replace(block, holds=((first, last),))


def _keep(schedules: list[_Schedule], entry: _Schedule) -> None:
    if any(all(x <= y for x, y in zip(kept[:3], entry[:3], strict=True)) for kept in schedules):
        return
    schedules[:] = [k for k in schedules if not all(x <= y for x, y in zip(entry[:3], k[:3], strict=True))]
    schedules.append(entry)


SCHEMES: dict[str, Scheme] = {"swapnet": swapnet, "first-resident": first_resident, "window": window_only}


def check_names(scheme: str, objective: str = OBJECTIVES[0]) -> None:
    """Refuse names that mean no way of planning.

    Raises:
        UsageError: no such scheme, or no such objective.
    """
    if scheme not in ("best", *SCHEMES):
        raise UsageError(f"there is no scheme {scheme!r}; there are best, {', '.join(SCHEMES)}")
    if objective not in OBJECTIVES:
        raise UsageError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
