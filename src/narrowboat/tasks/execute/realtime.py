"""The executor's threads: which core, which scheduling class; and what was not granted."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from dataclasses import dataclass, field

_M_ARENA_MAX = -8
_SWITCH_INTERVAL = 0.0005  # seconds; with Python's 5 ms a thread that wakes up waits that long for a busy one
COMPUTE, DISPATCH, LOAD = (
    60,
    70,
    65,
)  # SCHED_FIFO priorities: below the kernel's own threads at 99 and 50 and over users'

_AT_FIRST = os.sched_getaffinity(0)  # cores that we were given before any thread chose its own


@dataclass
class RealTime:
    """What the system granted.

    Attributes:
        fifo: the real-time class.
        pinned: cores of their own.
        lost: what is missing, in words.
    """

    fifo: bool = True
    pinned: bool = True
    lost: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """For the record."""
        return {"fifo": self.fifo, "pinned": self.pinned, "lost": list(self.lost)}


def prepare_process() -> None:
    """One heap, quick hand-over between threads. Before any of the threads begins."""
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    sys.setswitchinterval(_SWITCH_INTERVAL)


def freeze() -> None:
    """The garbage collector leaves what there is alone, and does not run by itself."""
    gc.collect()
    gc.freeze()
    gc.disable()


def thaw() -> None:
    """The collector as it was."""
    gc.enable()
    gc.unfreeze()


def enter(granted: RealTime, priority: int, core: int | None) -> None:
    """Put the calling thread on its core and into the real-time class; note what is refused."""
    move(granted, 0, priority, core)


def move(granted: RealTime, thread: int, priority: int, core: int | None) -> None:
    """The same for a thread by its number in the system; 0 for the calling one."""
    if core is not None:
        try:
            os.sched_setaffinity(thread, {core})
        except OSError as error:
            granted.pinned = False
            _note(
                granted, f"core {core} was refused ({error.strerror}): threads may be moved in the middle of a block"
            )
    try:
        os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(priority))
    except OSError as error:
        granted.fifo = False
        _note(
            granted,
            f"the real-time class was refused ({error.strerror}): other programs may take the core for tens of "
            "milliseconds; run as root, or with CAP_SYS_NICE",
        )


def leave() -> None:
    """The calling thread back to ordinary scheduling."""
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.sched_setaffinity(0, _AT_FIRST)


def cores(compute: int | None, load: int | None) -> tuple[int | None, int | None]:
    """The cores to use: those given, else the last for computing and the first for the rest, if there are two."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        return compute, load
    return (compute if compute is not None else allowed[-1], load if load is not None else allowed[0])


def _note(granted: RealTime, said: str) -> None:
    if said not in granted.lost:
        granted.lost.append(said)
