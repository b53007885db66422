"""Which experts the next stack will want: its router, asked ahead of time with what this stack computes on.

From one layer to the next a token's state changes little, so the next router's answer to the present state is often
what it will answer to its own (Eliseev and Mazur, 2023). Every forecast is compared with what was then wanted, and
experts are read on one only where that pays: of those that were out, a share p came to be wanted. One that comes to be
wanted saves its reading time while storage is idle; one that does not takes as much while storage is busy; and either
puts somebody out who would have been used with a chance q. With storage busy a share u of the time, p (1 - u) has to
be more than (1 - p) u + q, which is: p more than u + q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from narrowboat.arena.slot import Weight
from narrowboat.profile.experts import Stack

_LEAST = 0.5  # of the experts foreseen, at least this share has to be right, however idle the storage is
_ENOUGH = 12  # experts foreseen before a share says anything
_MEMORY = 256  # experts foreseen after which what is known counts half


@dataclass(slots=True)
class Record:
    """How well one stack was foreseen, counting experts that were out.

    Attributes:
        foreseen: how many were.
        wanted: of those, how many were wanted.
    """

    foreseen: int = 0
    wanted: int = 0


class Forecast:
    """Foresees the experts of each stack but the first.

    Args:
        module: the model.
        stacks: in order of use.
        numbers: ``id(tensor) -> weight number``.
        weights: all weights, by number.

    Attributes:
        records: by stack, how well it was foreseen.
    """

    def __init__(
        self, module: nn.Module, stacks: Sequence[Stack], numbers: dict[int, int], weights: Sequence[Weight]
    ) -> None:
        modules = dict(module.named_modules())
        self._routers = [_router(modules, stack, numbers, weights) for stack in stacks]
        self.records = [Record() for _ in stacks]
        self._open: list[frozenset[int]] = [frozenset() for _ in stacks]  # foreseen, and out at that time

    def look(self, stack: int, rows: torch.Tensor, count: int) -> list[int]:
        """The ``count`` experts that ``stack`` is likely to want; none where it has no router or is out.

        Args:
            stack: its number.
            rows: what the stack before computes on, [copies of one token's state, width]; others are not foreseen.
            count: how many a token wants.
        """
        router = self._routers[stack] if stack < len(self._routers) else None
        if router is None or not rows.shape[0] or rows.shape[0] > count:
            return []
        slot = router.slots[0]
        if not slot.inside or slot.view.shape[1] != rows.shape[1] or slot.view.dtype != rows.dtype:
            return []
        if (rows != rows[:1]).any():
            return []
        with torch.no_grad():
            scores = torch.mv(slot.view, rows[0])
            found: list[int] = scores.topk(min(count, scores.shape[0])).indices.tolist()
            return found

    def expect(self, stack: int, out: Sequence[int], busy: float, chance: float) -> bool:
        """Note that ``stack`` is thought to want ``out``, which are not in; whether to read them on that.

        Args:
            stack: its number.
            out: experts.
            busy: share of the time that storage is read.
            chance: that an expert in the cache is used in a pass.
        """
        self._open[stack] = frozenset(out)
        record = self.records[stack]
        return record.foreseen >= _ENOUGH and record.wanted > max(_LEAST, busy + chance) * record.foreseen

    def judge(self, stack: int, wanted: Sequence[int]) -> None:
        """Compare what ``stack`` wants with what was thought."""
        foreseen, self._open[stack] = self._open[stack], frozenset()
        if not foreseen:
            return
        record = self.records[stack]
        record.foreseen += len(foreseen)
        record.wanted += len(foreseen.intersection(wanted))
        if record.foreseen > _MEMORY:
            record.foreseen //= 2
            record.wanted //= 2


def _router(
    modules: dict[str, nn.Module], stack: Stack, numbers: dict[int, int], weights: Sequence[Weight]
) -> Weight | None:
    """The one matrix beside the stack with a row per expert; None if there is none, or several."""
    if not stack.name:
        return None
    beside = modules[stack.name.rpartition(".")[0]]
    inside = {id(child) for child in modules[stack.name].modules()}
    found = {
        numbers[id(tensor)]
        for child in beside.modules()
        if id(child) not in inside
        for tensor in child._parameters.values()
        if tensor is not None and id(tensor) in numbers and tensor.dim() == 2 and tensor.shape[0] == stack.count
    }
    return weights[found.pop()] if len(found) == 1 else None
