"""What kernels take inside: the allocator's blocks while an operator runs, beyond what it gives back.

oneDNN's convolutions reorder weights and images into scratch memory of their own, as large as the images. It is gone
when the operator returns, so no tensor shows it, and which algorithm takes how much changes with the number of
samples. So each distinct call of a pass is made once, alone, on zeros, at its true size, and torch's profiler, which
hears of every block of the allocator, tells the most that it held.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd.profiler import profile, record_function

from narrowboat.machine.malloc import trim
from narrowboat.train.measure.calls import Call
from narrowboat.train.random_state import RandomState
from narrowboat.train.tape.structure import BackwardEvent, Tape, TapeOp

log = logging.getLogger("narrowboat")
_PREFIX = "narrowboat call "
_Each = TypeVar("_Each", TapeOp, BackwardEvent)
_SMALLEST = 256 << 10  # bytes of a call's tensors; below it no kernel takes much
_LARGE = 1 << 20
_ERROR = 2  # of c10's levels of logging


@dataclass(frozen=True, slots=True)
class Taken:
    """What one call took.

    Attributes:
        highest: the most bytes that it held at once.
        turnover: all bytes that it asked for; a heap whose holes do not fit may hold as many.
    """

    highest: int
    turnover: int


class Kernels:
    """Remembers what calls took. Where the profiler cannot be had, nothing is known and nothing fails.

    Attributes:
        limit: bytes of a call's own tensors; a larger one is not tried, as it fits into no plan either.
    """

    def __init__(self) -> None:
        self.limit = sys.maxsize
        self._taken: dict[str, Taken] = {}

    @staticmethod
    def load() -> None:
        """Have the profiler load what it needs."""
        measured([])

    def with_scratch(self, tape: Tape) -> Tape:
        """``tape`` with the scratch memory of its operators, forward and backward."""
        told = [*(op.call for op in tape.ops), *(event.call for event in tape.backward)]
        calls: list[Call] = [call for call in told if call is not None]
        small = [call for call in calls if _SMALLEST <= call.nbytes <= self.limit]
        missing = {call.key: call for call in small if call.key not in self._taken}
        if missing:
            # A call that fails alone is not asked for again.
            self._taken |= dict.fromkeys(missing, Taken(0, 0)) | measured(list(missing.values()))
        return replace(
            tape,
            ops=[op if op.call is None else self._told(op, op.call) for op in tape.ops],
            backward=[event if event.call is None else self._told(event, event.call) for event in tape.backward],
        )

    def _told(self, each: _Each, call: Call) -> _Each:
        taken = self._taken.get(call.key, Taken(0, 0))
        return replace(each, scratch=max(0, taken.highest - call.made), turnover=taken.turnover)


def measured(calls: list[Call]) -> dict[str, Taken]:
    """For each call, by its key, what it took beyond its arguments."""
    if torch._C._autograd._profiler_enabled():  # somebody else's, which a second one would end
        return {}
    random = RandomState()
    # The profiler's library reads this when it is first used, and tells of every start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        with _only_errors_of_c10(), torch.enable_grad(), profile(profile_memory=True) as profiled:
            for number, call in enumerate(calls):
                with contextlib.suppress(Exception):  # zeros are not for every operator
                    _call(number, call)
                if call.nbytes >= _LARGE:
                    trim(refill=False)  # or the holes of all of them add up
        spans = _taken(profiled.kineto_results.events())
    except (RuntimeError, AttributeError) as error:  # at work already; or another torch's
        log.debug("kernels' scratch memory is not measured: %s", error)
        return {}
    finally:
        random.restore()
    return {call.key: spans[number] for number, call in enumerate(calls) if number in spans}


def _call(number: int, call: Call) -> None:
    args, kwargs = call.arguments()
    with record_function(f"{_PREFIX}{number}"):
        call.func(*args, **kwargs)


@contextmanager
def _only_errors_of_c10() -> Iterator[None]:
    """Without a line on stderr for every thousandth block that is older than the profile."""
    try:
        library = next((Path(torch.__file__).parent / "lib").glob("libc10.so*"))
        level = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    except (OSError, ValueError, StopIteration):
        yield
        return
    before, level.value = level.value, max(level.value, _ERROR)
    try:
        yield
    finally:
        level.value = before


def _taken(events: Any) -> dict[int, Taken]:
    spans, blocks = [], []
    for event in events:
        name = event.name()
        if name == "[memory]":
            blocks.append((event.start_ns(), event.nbytes()))
        elif name.startswith(_PREFIX):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns(), int(name[len(_PREFIX) :])))
    blocks.sort(key=lambda block: block[0])
    taken: dict[int, Taken] = {}
    place = 0
    for start, end, number in sorted(spans):
        while place < len(blocks) and blocks[place][0] < start:
            place += 1
        held = most = turnover = 0
        while place < len(blocks) and blocks[place][0] <= end:
            held += blocks[place][1]
            most = max(most, held)
            turnover += max(0, blocks[place][1])
            place += 1
        taken[number] = Taken(most, turnover)
    return taken
