"""Expert stacks: weights of which a pass needs only the rows that its router chooses, and which can be read by rows.

A stack is found by what is done with it, not by its class: three dimensions or more, the first of them numbering the
experts, and every operator of the trace takes single rows (``profile.rowwise``). Without a trace, two such weights of
one module that agree on the number of experts are taken for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from narrowboat.arena.slot import Weight
from narrowboat.profile.skeleton import Matched
from narrowboat.profile.use_trace import UseTrace

PAGE = 4096
LEAST = 32 << 10  # rows up to here are left with their stacks: reading each by itself would cost more than it saves
BY_EXPERT = "expert by expert"  # how a weight of a stack is used, for messages


@dataclass(frozen=True)
class Stack:
    """The expert weights of one module.

    Attributes:
        name: the module.
        count: experts.
        weights: the numbers of its weights, in order of first use.
    """

    name: str
    count: int
    weights: tuple[int, ...]


@dataclass(frozen=True)
class Experts:
    """All stacks of a model, in order of first use.

    Attributes:
        stacks: them.
        total: bytes of all experts, as the cache counts them.
        least: bytes of the largest single row: the smallest cache with which the model can run.
        comfort: bytes from which on the experts of one layer are read while others compute; the plan sets aside that
            much before it keeps ordinary weights in.
        demand: bytes that a pass is thought to want before anybody has seen one: two experts of each stack.
    """

    stacks: tuple[Stack, ...]
    total: int
    least: int
    comfort: int
    demand: int

    @property
    def weights(self) -> frozenset[int]:
        """The numbers of the weights that are read by rows."""
        return frozenset(w for stack in self.stacks for w in stack.weights)


def span(weight: Weight, expert: int) -> tuple[int, int]:
    """The whole pages ``(first byte, past the last)`` that one expert's row takes, counted from the weight's first."""
    row = weight.entry.nbytes // weight.entry.shape[0]
    low, high = expert * row, (expert + 1) * row
    return low // PAGE * PAGE, -(-high // PAGE) * PAGE


def find_experts(module: nn.Module, matched: Matched, trace: UseTrace | None) -> Experts | None:
    """The stacks of ``module``; None if it has none.

    Args:
        module: the skeleton.
        matched: its weights.
        trace: one pass, taken in advance; None if there is none.
    """
    order = {w: at for at, w in enumerate(trace.execution_order())} if trace is not None else {}
    stacks: list[Stack] = []
    seen: set[int] = set()
    for name, child in module.named_modules():
        if type(child).__module__.startswith("torch.nn"):
            continue
        owned = [
            matched.numbers[id(t)] for t in child._parameters.values() if t is not None and id(t) in matched.numbers
        ]
        found = [w for w in dict.fromkeys(owned) if w not in seen and _by_rows(matched.weights[w], w, trace, order)]
        for count, alike in Counter(matched.weights[w].entry.shape[0] for w in found).items():
            if trace is None and alike < 2:
                continue
            same = [w for w in found if matched.weights[w].entry.shape[0] == count]
            stacks.append(Stack(name, count, tuple(sorted(same, key=lambda w: order.get(w, w)))))
            seen.update(same)
    if not stacks:
        return None
    stacks.sort(key=lambda stack: order.get(stack.weights[0], 0))
    sizes = [_sizes(stack, matched.weights) for stack in stacks]
    least = max(max(rows) for by_weight in sizes for rows in by_weight)
    # Two experts with all their weights: one is read while the other computes.
    pairs = [2 * max(sum(rows) for rows in zip(*by_weight, strict=True)) for by_weight in sizes]
    comfort, demand = max(pairs), sum(pairs)
    total = sum(sum(rows) for by_weight in sizes for rows in by_weight)
    return Experts(tuple(stacks), total, least, min(comfort, total), min(demand, total))


def _sizes(stack: Stack, weights: Sequence[Weight]) -> list[list[int]]:
    spans = [[span(weights[w], e) for e in range(stack.count)] for w in stack.weights]
    return [[high - low for low, high in row] for row in spans]


def _by_rows(weight: Weight, number: int, trace: UseTrace | None, order: dict[int, int]) -> bool:
    entry = weight.entry
    if len(entry.shape) < 3 or entry.shape[0] < 2 or entry.nbytes // entry.shape[0] < LEAST or weight.tiled:
        return False
    return trace is None or (number in order and number not in trace.whole and number not in trace.written)


def without_experts(trace: UseTrace, experts: Experts, weights: Sequence[Weight]) -> UseTrace:
    """The trace of the same pass with its experts read on demand, beside the walk along the trace.

    A product by groups may be made group by group: one result lies beside the output then.
    """
    gone = experts.weights
    traffic, peaks, fresh = list(trace.traffic), list(trace.peaks), list(trace.fresh)
    for step, used in enumerate(trace.uses):
        stacked = [w for w in used if w in gone]
        if stacked:
            traffic[step] = max(traffic[step] - sum(weights[w].entry.nbytes for w in stacked), 0.0)
            peaks[step] += trace.largest[step]
            fresh[step] += trace.largest[step]
    return replace(
        trace,
        uses=[[w for w in used if w not in gone] for used in trace.uses],
        holds=[hold for hold in trace.holds if hold[0] not in gone],
        traffic=traffic,
        peaks=peaks,
        fresh=fresh,
        activation_bytes=max([trace.activation_bytes, *peaks]),
    )


def by_expert(weights: Sequence[Weight], experts: Experts) -> list[Weight]:
    """The weights, those of stacks marked as such."""
    gone = experts.weights
    return [Weight(w.index, w.name, w.entry, BY_EXPERT) if w.index in gone else w for w in weights]
