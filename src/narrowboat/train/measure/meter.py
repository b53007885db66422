"""A dispatch mode that writes down a pass: operators, storages, their lives, and what autograd saves.

It runs over fake tensors (nothing is computed or allocated) as well as over real ones (then durations are measured).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from narrowboat.train.measure.calls import Call, call_of
from narrowboat.train.measure.clock import HOST, Clock
from narrowboat.train.tape.facts import OpFacts, facts_of
from narrowboat.train.tape.leaves import is_fake, plain, tensors_in, written_tensors
from narrowboat.train.tape.renormal import lasting_results, renormalised
from narrowboat.train.tape.storages import StorageNumbers
from narrowboat.train.tape.structure import BackwardEvent, Tape, TapeOp, TapeStorage

_INT16_MAX, _INT32_MAX = (1 << 15) - 1, (1 << 31) - 1
_SMALLEST_TO_SHRINK = 4096  # bytes; below it the bookkeeping costs more than it saves


class _Kept:
    """What the graph holds for a saved tensor; its end is the end of the saving."""

    __slots__ = ("meter", "number", "saved_at", "tensor")

    def __init__(self, meter: Meter, number: int, saved_at: int, tensor: torch.Tensor) -> None:
        self.meter = meter
        self.number = number
        self.saved_at = saved_at
        self.tensor = tensor

    def __del__(self) -> None:
        self.meter.note("done", self.number, self.saved_at)


_TRIED = 256 << 10  # bytes of an activation on which a replay is timed


class Meter(TorchDispatchMode):
    """Writes down one forward pass, and the backward pass if one follows.

    Args:
        model: whose modules' names are noted with the operators; None for no names.
        keep: whether autograd's saved tensors are kept (a backward pass follows) or forgotten at once, which shows
            how long storages live when nothing is saved.
        clock: of what runs the operators.
    """

    def __init__(self, model: nn.Module | None, *, keep: bool, clock: Clock = HOST) -> None:
        super().__init__()
        self._clock = clock
        self._names = {id(module): name for name, module in model.named_modules()} if model is not None else {}
        self._keep = keep
        self._numbers = StorageNumbers(self._died)
        self._modules: list[str] = []
        self._forward = True
        self._off = False
        self._ops: list[TapeOp] = []
        self._storages: list[TapeStorage] = []
        self._outside_changed: set[int] = set()
        self._sizes: dict[int, int] = {}  # of storages made in the backward pass that are alive
        self._changes: list[tuple[str, int, int, int, Any]] = []  # with marks of the clock
        self._spans: list[tuple[Any, Any]] = []  # marks around each operator of the forward pass
        self._calls: dict[int, Call | None] = {}  # that made storages in the backward pass, by the first of them
        self._gradients: set[int] = set()
        self._aside = 0.0  # seconds of trying replays
        self._forward_span: tuple[Any, Any] | None = None
        self._backward_span: tuple[Any, Any] | None = None

    # -- the two passes ------------------------------------------------------------------------------------------

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The forward pass goes on inside."""
        before = nn.modules.module.register_module_forward_pre_hook(self._enter_module)
        after = nn.modules.module.register_module_forward_hook(self._leave_module)
        began = self._clock.mark()
        try:
            with saved_tensors_hooks(self._pack, self._unpack), self:
                yield
        finally:
            before.remove()
            after.remove()
            self._forward_span = began, self._clock.mark()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The backward pass goes on inside."""
        self._forward = False
        began = self._clock.mark()
        self._backward_span = began, began
        try:
            with self:
                yield
        finally:
            self._backward_span = began, self._clock.mark()

    def take_gradients(self, parameters: list[nn.Parameter]) -> None:
        """After the backward pass: these parameters' gradients are not temporaries of it."""
        for parameter in parameters:
            if parameter.grad is not None and plain(parameter.grad):
                number = self._numbers.get(parameter.grad.untyped_storage())
                if number is not None:
                    self._gradients.add(number)

    def stop(self) -> None:
        """Note nothing any more, whatever dies later."""
        self._off = True
        self._numbers.clear()

    # -- what is noted -------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        facts = facts_of(func)
        if facts.view:
            return func(*args, **kwargs)
        start = self._clock.mark()
        out = func(*args, **kwargs)
        span = start, self._clock.mark()
        if not self._forward:
            self._note_backward(func, args, kwargs, out)
            return out
        read: list[int] = []
        outside: list[int] = []
        for tensor in tensors_in((args, kwargs)):
            if plain(tensor):
                number = self._numbers.require(tensor.untyped_storage())
                (read if number >= 0 else outside).append(number)
        written = [
            self._numbers.require(tensor.untyped_storage())
            for tensor in written_tensors(facts, args, kwargs)
            if plain(tensor)
        ]
        created: list[int] = []
        for tensor in tensors_in(out):
            if plain(tensor) and self._numbers.get(tensor.untyped_storage()) is None:
                created.append(self._create(tensor, func, args))
        changed = tuple(dict.fromkeys(n for n in written if n >= 0))
        outside_changed = tuple(dict.fromkeys(n for n in written if n < 0))
        if not created and not changed and not outside_changed:
            return out
        lasting, again = self._replayed_for_less(facts, args, out)
        index = len(self._ops)
        for number in changed:
            self._storages[number].last_write = index
            if facts.name in ("aten::bernoulli_", "aten::native_dropout"):
                self._storages[number].shrinks = max(self._storages[number].nbytes // 32, 1)
        self._outside_changed.update(outside_changed)
        self._spans.append(span)
        self._ops.append(
            TapeOp(
                index=index,
                name=facts.name,
                kind=facts.kind,
                module=self._modules[-1] if self._modules else "",
                random=facts.random,
                created=tuple(created),
                read=tuple(dict.fromkeys(read)),
                changed=changed,
                outside=tuple(outside),
                outside_changed=outside_changed,
                call=call_of(func, args, kwargs, sum(self._storages[n].nbytes for n in created))
                if self._keep
                else None,
                seconds_again=again,
                lasting=lasting,
            )
        )
        return out

    def _replayed_for_less(
        self, facts: OpFacts, args: tuple[Any, ...], out: Any
    ) -> tuple[tuple[int, ...], float | None]:
        """Storages that last for a replay that costs less, and its seconds if this pass is timed."""
        places = lasting_results(facts, args)
        if not places:
            return (), None
        lasting = tuple(self._numbers.require(out[place].untyped_storage()) for place in places)
        if is_fake(out[0]):
            return lasting, None
        # A few rows tell it, and take next to no memory.
        some = args[0][: max(1, _TRIED // max(args[0][:1].nbytes, 1))]
        start = time.perf_counter()
        renormalised(some, *args[1:3], *(out[place] for place in places))
        seconds = time.perf_counter() - start
        self._aside += seconds
        return lasting, seconds * len(args[0]) / len(some)

    def _create(self, tensor: torch.Tensor, func: Any, args: tuple[Any, ...]) -> int:
        storage = tensor.untyped_storage()
        number = self._numbers.add_inside(storage)
        index = len(self._ops)
        self._storages.append(
            TapeStorage(number, storage.nbytes(), index, index, shrinks=_shrinks(tensor, storage.nbytes(), args))
        )
        return number

    def _note_backward(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        first = True
        for tensor in tensors_in(out):
            if plain(tensor) and self._numbers.get(tensor.untyped_storage()) is None:
                storage = tensor.untyped_storage()
                number = self._numbers.add_inside(storage)
                self._sizes[number] = storage.nbytes()
                if first:
                    self._calls[number] = call_of(func, args, kwargs, storage.nbytes())
                first = False
                self._changes.append(("born", number, 0, storage.nbytes(), self._clock.mark()))

    def _died(self, number: int) -> None:
        if self._off or number < 0:
            return
        if number < len(self._storages):
            if self._forward:
                self._storages[number].dies = len(self._ops)
        elif number in self._sizes:
            size = self._sizes.pop(number)
            self._changes.append(("died", number, 0, size, self._clock.mark()))

    def note(self, kind: str, number: int, saved_at: int) -> None:
        """A saved tensor was asked for, or let go."""
        if not self._forward and not self._off:
            self._changes.append((kind, number, saved_at, 0, self._clock.mark()))

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not plain(tensor):
            return tensor
        number = self._numbers.get(tensor.untyped_storage())
        if number is None or number < 0:
            return tensor
        at = len(self._ops)
        self._storages[number].saved_at.append(at)
        return _Kept(self, number, at, tensor) if self._keep else None

    def _unpack(self, kept: Any) -> torch.Tensor:
        if isinstance(kept, _Kept):
            self.note("need", kept.number, kept.saved_at)
            return kept.tensor
        return kept

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._modules.append(self._names.get(id(module), self._modules[-1] if self._modules else ""))

    def _leave_module(self, module: nn.Module, _: Any, __: Any) -> None:
        if self._modules:
            self._modules.pop()

    # -- what comes of it ----------------------------------------------------------------------------------------

    def tape(self, batch: int) -> Tape:
        """The pass as numbers."""
        events: list[BackwardEvent] = []
        live = grown = 0
        for op, span in zip(self._ops, self._spans, strict=True):
            op.seconds = self._clock.seconds(*span)
        for kind, number, saved_at, size, mark in self._changes:
            assert self._backward_span is not None
            seconds = self._clock.seconds(self._backward_span[0], mark)
            if kind in ("born", "died"):
                if number in self._gradients:
                    grown += size  # what it was summed from may still be there
                else:
                    live += size if kind == "born" else -size
                call = self._calls.get(number) if kind == "born" else None
                events.append(BackwardEvent("live", number, 0, live, seconds, grown, call=call))
            else:
                events.append(BackwardEvent(kind, number, saved_at, live, seconds, grown))
        return Tape(
            ops=self._ops,
            storages=self._storages,
            backward=events,
            batch=batch,
            outside_changed=frozenset(self._outside_changed),
            forward_seconds=self._took(self._forward_span) - self._aside,
            backward_seconds=self._took(self._backward_span),
        )

    def _took(self, span: tuple[Any, Any] | None) -> float:
        return self._clock.seconds(*span) if span is not None else 0.0


def _shrinks(tensor: torch.Tensor, nbytes: int, args: tuple[Any, ...]) -> int:
    if nbytes < _SMALLEST_TO_SHRINK:
        return 0
    if tensor.dtype == torch.bool:
        return nbytes // 8
    if tensor.dtype == torch.int64 and args and isinstance(args[0], torch.Tensor) and args[0].dim() >= 3:
        # Pooling gives indices into one plane of its input.
        plane = args[0][0, 0].numel() if args[0].dim() > 3 else args[0].shape[-1]
        return nbytes // 4 if plane <= _INT16_MAX else nbytes // 2 if plane <= _INT32_MAX else 0
    return 0


def walk(
    model: nn.Module | None,
    loss: Callable[[], torch.Tensor],
    parameters: list[nn.Parameter],
    batch: int,
    *,
    backward: bool = True,
    clock: Clock = HOST,
) -> Tape:
    """Write down a pass.

    Args:
        model: for the modules' names.
        loss: runs the forward pass; called once, or twice where ``backward``.
        parameters: those that get gradients; their ``grad`` is None before and after.
        batch: samples in the pass.
        backward: whether a backward pass is run and written down too.
        clock: of what runs the operators.

    Returns:
        The tape: lives of storages as they are when autograd keeps nothing, savings, and the backward pass.
    """
    meter = Meter(model, keep=False)
    with meter.forward():
        value = loss()
    meter.stop()
    del value
    natural = meter.tape(batch)
    if not backward:
        return natural
    meter = Meter(model, keep=True, clock=clock)
    try:
        with meter.forward():
            value = loss()
        with meter.backward():
            value.backward()
        meter.take_gradients(parameters)
    finally:
        meter.stop()
        for parameter in parameters:
            parameter.grad = None
    tape = meter.tape(batch)
    if tape.signature() == natural.signature():
        for storage, alone in zip(tape.storages, natural.storages, strict=True):
            storage.dies = alone.dies
    return tape
