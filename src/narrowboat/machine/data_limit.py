"""A limit on this process's data for the length of a block, so that an overrun is an error and not a kill.

Memory that the machine does not have ends a process without a word. A data limit ends the one allocation that goes too
far, as an error that can be caught; the step is then given up and done again in less. It counts private writable
address space, touched or not (heaps, anonymous mappings, stacks of threads), neither mapped files nor what is shared:
it is a safety net with a margin, not a meter.

Sources: setrlimit(2) on RLIMIT_DATA (mappings count since Linux 4.7), proc(5) for VmData.
"""

from __future__ import annotations

import errno
import mmap
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from narrowboat.errors import NarrowboatError, UsageError
from narrowboat.machine.memory import process_memory

# What allocators and libraries say when they get no memory and raise a plain RuntimeError.
_SAYINGS = (
    "can't allocate memory",  # c10's allocator on Linux
    "cannot allocate memory",  # errno 12 in words
    "not enough memory",  # c10's allocator elsewhere, torch.from_file
    "out of memory",  # CUDA, HIP, MPS
    "bad_alloc",
    "unable to allocate",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED and its sisters
    "can't start new thread",  # no room for its stack
    # oneDNN names the object it could not make, not the reason.
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
)
_DEEPEST_CAUSE = 8


@contextmanager
def data_limit(extra_bytes: int) -> Iterator[str]:
    """Let this process's data grow by ``extra_bytes`` and no further while the block runs.

    The soft limit is set and put back as it was; the hard limit stays, and so does a tighter soft limit that was set
    before: blocks nest. It holds for every thread. What the block takes beyond fails as memory does that the machine
    does not have; see :func:`is_out_of_memory`. Start threads before: the stack of each counts, with 8 MiB as a rule.

    Yields:
        An empty string, or the reason why there is no limit, in words.

    Raises:
        UsageError: ``extra_bytes`` is negative.
    """
    if extra_bytes < 0:
        raise UsageError(f"a data limit of {extra_bytes} extra bytes: give 0 or more")
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    reason = _set(extra_bytes, before, hard)
    try:
        yield reason
    finally:
        if not reason:
            resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def _set(extra_bytes: int, before: int, hard: int) -> str:
    try:
        wanted = process_memory().data + extra_bytes
        limit = min([wanted, *(each for each in (before, hard) if each != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    except (OSError, ValueError, OverflowError, NarrowboatError) as error:
        return f"the data limit (RLIMIT_DATA) cannot be set: {error}"
    # Some kernels keep the number and never look at it: before 4.7, with ignore_rlimit_data, and some sandboxes.
    try:
        mmap.mmap(-1, extra_bytes + (64 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return ""
    resource.setrlimit(resource.RLIMIT_DATA, (before, hard))
    return "this kernel does not hold processes to their data limit (RLIMIT_DATA)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, says that there was no memory to be had.

    Python and numpy raise MemoryError; torch's allocators, CUDA and oneDNN raise RuntimeError, told by its text.
    """
    torch = sys.modules.get("torch")  # this room does not import it
    named: tuple[type[BaseException], ...] = (MemoryError,)
    if torch is not None and hasattr(torch, "OutOfMemoryError"):
        named = (MemoryError, torch.OutOfMemoryError)
    each: BaseException | None = error
    for _ in range(_DEEPEST_CAUSE):
        if each is None:
            return False
        if isinstance(each, named) or (isinstance(each, OSError) and each.errno == errno.ENOMEM):
            return True
        if isinstance(each, RuntimeError) and any(saying in str(each).lower() for saying in _SAYINGS):
            return True
        each = each.__cause__
    return False
