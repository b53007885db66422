"""What an operator does when it meets an expert stack: what it does in plain PyTorch, with the experts it needs in.

Whatever runs the experts (a loop, a gather, a product by groups; transformers has all three) ends in few operators.
Each is run as it is on the whole stack where all it needs is in at once; else expert by expert, with the same bits:
an expert's rows of the result depend on nothing else (measured for products by groups in every dtype they take).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from narrowboat.arena.slot import Weight
from narrowboat.arena.standin import TurnedStandIn, lazy_alias, slot_of, tracked_as_in_plain_calls
from narrowboat.errors import SessionClosedError, TiledWeightError
from narrowboat.profile.rowwise import aten, is_grouped, takes_rows, turns
from narrowboat.profile.tiles import whole_asked_for
from narrowboat.stream.engine import Engine
from narrowboat.stream.experts import ExpertCache
from narrowboat.stream.forecast import Forecast

if TYPE_CHECKING:
    from narrowboat.stream.session import Session


class ExpertOperators:
    """Runs operators that meet a stand-in of a stack.

    Args:
        cache: brings experts in.
        engine: its lock, and its word on whether the session lives.
    """

    def __init__(self, cache: ExpertCache, engine: Engine) -> None:
        self._cache = cache
        self._engine = engine

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stack: torch.Tensor) -> Any:
        """The result of ``func``; ``stack`` is the stand-in among its arguments.

        Raises:
            SessionClosedError: nobody is left to read experts.
            TiledWeightError: the operator wants all experts at once, and the cache cannot hold them.
            StorageError, WeightsChangedError: a read failed.
        """
        if turns(func, args) and args[0] is stack:
            return slot_of(stack).tensor.detach() if _turned(stack) else TurnedStandIn.of(slot_of(stack))
        if func is aten.detach.default or func is aten.alias.default:
            return stack if _turned(stack) else lazy_alias(slot_of(stack))
        weight = slot_of(stack).weight
        with self._at_work():
            if takes_rows(func, args, stack):
                if is_grouped(func):
                    return self._grouped(func, args, kwargs, weight)
                if func is aten.select.int and not _turned(stack):
                    return self._select(func, weight, args[2])
                if not _turned(stack):
                    return self._gather(func, args, weight, args[-1] if func is not aten.index.Tensor else args[1][0])
            return self._all(func, args, kwargs, stack, weight)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        engine = self._engine
        with engine.lock:
            if engine.closed:
                raise SessionClosedError(engine.closed)
            inside = engine.depth > 0
            if not inside:
                engine.mend()
                engine.on_touch()
            try:
                yield
                if not inside:
                    engine.on_touch()
            except Exception:
                raise
            except BaseException:
                engine.torn = True
                raise

    def _select(self, func: Any, weight: Weight, expert: int) -> torch.Tensor:
        count = weight.entry.shape[0]
        if not -count <= expert < count:
            raise IndexError(f"index {expert} is out of bounds for dimension 0 with size {count}")
        for _ in self._cache.portions(weight, [expert % count]):
            pass
        result: torch.Tensor = func(self._cache.row(weight, expert % count), 0, 0)
        return result

    def _gather(self, func: Any, args: tuple[Any, ...], weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        whole, count = self._cache.whole(weight), weight.entry.shape[0]
        if ids.numel() and not -count <= int(ids.min()) <= int(ids.max()) < count:
            raise IndexError(f"index out of range: {weight.name!r} has {count} experts")
        flat = ids.reshape(-1).long() % count
        wanted = torch.unique(flat).tolist()
        out: torch.Tensor | None = None
        for portion in self._cache.portions(weight, wanted):
            if len(portion) == len(wanted):
                return self._plainly(func, (whole, *args[1:]), {})
            if out is None:
                out = torch.empty((flat.numel(), *weight.entry.shape[1:]), dtype=weight.entry.dtype)
            for expert in portion:
                out[(flat == expert).nonzero().view(-1)] = whole[expert]
        if out is None:  # nothing is looked up
            return self._plainly(func, (whole, *args[1:]), {})
        return out.view(*ids.shape, *weight.entry.shape[1:])

    def _grouped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight) -> torch.Tensor:
        rows, stack, offsets, *rest = args

        def product(low: int, high: int, first: int, last: int, offsets: torch.Tensor) -> torch.Tensor:
            matrices = self._cache.whole(weight)[first:last]  # let go of on return: nobody leaves who is looked at
            if _turned(stack):
                matrices = matrices.transpose(-2, -1)
            result: torch.Tensor = self._plainly(func, (rows[low:high], matrices, offsets, *rest), kwargs)
            return result

        ends = offsets.tolist()
        starts = [0, *ends[:-1]]
        wanted = [e for e in range(len(ends)) if ends[e] > starts[e]]
        out: torch.Tensor | None = None
        for portion in self._cache.portions(weight, wanted):
            if out is None:  # once those that are wanted now are on their way
                self._cache.foresee(weight, wanted, rows)
            if len(portion) == len(wanted):
                return product(0, rows.shape[0], 0, len(ends), offsets)
            for e in portion:
                low, high = starts[e], ends[e]
                part = product(low, high, e, e + 1, offsets.new_tensor([high - low]))
                if out is None:
                    out = part.new_empty_strided((rows.shape[0], part.shape[1]), part.stride())
                out[low:high] = part
        return product(0, rows.shape[0], 0, len(ends), offsets) if out is None else out

    def _all(self, func: Any, args: Any, kwargs: Any, stack: torch.Tensor, weight: Weight) -> Any:
        if not self._cache.together(weight):
            raise TiledWeightError(whole_asked_for(weight))
        whole = self._cache.whole(weight)
        real = whole.transpose(-2, -1) if _turned(stack) else whole
        given_args, given_kwargs = tree_map(lambda leaf: real if leaf is stack else leaf, (args, kwargs))
        out = self._plainly(func, given_args, given_kwargs)
        return stack if out is real else out

    @staticmethod
    def _plainly(func: Any, args: Any, kwargs: Any) -> Any:
        with tracked_as_in_plain_calls(func):
            return func(*args, **kwargs)


def start_experts(session: Session) -> ExpertCache | None:
    """The cache of a session whose experts are read on demand, with the operators that meet them led to it."""
    prepared = session.prepared
    if prepared.experts is None:
        return None
    engine = session.engine

    def waited(name: str, before: float, after: float) -> None:
        engine.record.stall += after - before
        engine.stopwatch.waited(name, before, after)

    cache = ExpertCache(
        prepared.experts,
        prepared.weights,
        session.reader,
        {str(file.path): number for number, file in enumerate(session.files)},
        packed=prepared.index.packed,
        ledger=session.ledger,
        waited=waited,
        forecast=Forecast(prepared.module, prepared.experts.stacks, prepared.matched.numbers, prepared.weights),
        lock=session.ground.lock_memory,
    )
    operators = ExpertOperators(cache, engine)
    for w in prepared.experts.weights:
        prepared.weights[w].by_rows = operators
    return cache


def _turned(stack: torch.Tensor) -> bool:
    return isinstance(stack, TurnedStandIn)
