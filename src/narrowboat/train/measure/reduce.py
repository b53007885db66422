"""SAGE's subgraph reduction: which saved storages of a unit are cheap to compute again. Pure, no torch.

SAGE (Gim and Ko, MobiSys 2022) keeps a value if it is an output, comes from a complex operator (contraction,
reduction, other), or if the operators times the inputs of the subgraph behind it exceed a threshold of 5; the rest is
computed again inside each consumer. Beside that rule stands a cost-based one: whatever maps alone can compute again.
"""

from __future__ import annotations

from collections.abc import Iterable

from narrowboat.train.tape.facts import Kind
from narrowboat.train.tape.slices import SliceConflictError, program
from narrowboat.train.tape.structure import Tape

SAGE_THRESHOLD = 5
_SMALLEST = 4096  # bytes; dropping less is not worth an operator


def sage_rule(tape: Tape, saved: Iterable[int], start: int, threshold: int = SAGE_THRESHOLD) -> frozenset[int]:
    """Storages of a unit that SAGE's rule recomputes.

    Args:
        tape: the pass.
        saved: storages saved in the unit.
        start: the unit's first operator.
        threshold: largest product of operators and inputs that is recomputed.
    """
    return _drop(tape, saved, start, threshold)


def maps_rule(tape: Tape, saved: Iterable[int], start: int) -> frozenset[int]:
    """Storages of a unit that maps alone compute again, however long the chain."""
    return _drop(tape, saved, start, None)


def _drop(tape: Tape, saved: Iterable[int], start: int, threshold: int | None) -> frozenset[int]:
    everything = frozenset(saved)
    dropped: set[int] = set()
    for number in sorted(everything):
        storage = tape.storages[number]
        if storage.creator < start or storage.nbytes < _SMALLEST:
            continue
        # Later ones are tried on top of the earlier ones dropped: a chain of maps goes back to one kept value.
        kept = everything - dropped - {number}
        try:
            made = program(tape, {number}, start, kept=kept)
        except SliceConflictError:
            continue
        ops = [tape.ops[index] for index in made.ops]
        if any(op.kind is not Kind.MAP for op in ops):
            continue
        if threshold is not None and len(ops) * max(len(made.inputs), 1) > threshold:
            continue
        dropped.add(number)
    return _consistent(tape, everything, dropped, start)


def _consistent(tape: Tape, saved: frozenset[int], dropped: set[int], start: int) -> frozenset[int]:
    while dropped:
        try:
            program(tape, dropped, start, kept=saved - dropped)
        except SliceConflictError as conflict:
            if conflict.number in saved and conflict.number not in dropped:
                # Something dropped reads it as it was before: give the last of them up.
                dropped.discard(max(dropped))
                continue
            raise
        return frozenset(dropped)
    return frozenset()
