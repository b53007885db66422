"""One slab of memory per session: anonymous, page-aligned, populated before it is needed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from functools import cache

import torch

from narrowboat.arena.exports import forget, watch
from narrowboat.errors import StorageError
from narrowboat.quantities import format_bytes

PAGE = 4096
_HUGE = 2 << 20
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python 3.11's mmap module
_PIECE = 16 << 20  # bytes populated at a time behind the caller's back


class Slab:
    """Anonymous memory handed out as tensor views by reference.

    A slab is a reservation of addresses. What of it is backed by memory is populated all at once, or range by range
    as its owner says (``hold``, ``release``), so that a plan can change without any weight changing its address.

    Args:
        nbytes: size in bytes; rounded up to a page.
        lock: keep what is held from being swapped out (``mlock``).
        populate: hold everything from the start; otherwise nothing.

    Attributes:
        locked: whether locking was asked for and granted for all that is held.

    Raises:
        StorageError: the system has no such memory to give.
    """

    def __init__(self, nbytes: int, *, lock: bool = False, populate: bool = True) -> None:
        self.nbytes = max(-(-nbytes // PAGE) * PAGE, PAGE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0 if populate else _MAP_NORESERVE)
        try:
            self._map = mmap.mmap(-1, self.nbytes, flags=flags)
        except OSError as error:
            raise StorageError(
                f"cannot reserve {format_bytes(nbytes)} of memory: {error.strerror}; lower the budget"
            ) from error
        self._view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._lock = self.locked = lock
        self._stop = threading.Event()
        self._populating: threading.Thread | None = None
        self._ticket = watch(self.address, self.nbytes)
        if populate:
            self.hold([(0, self.nbytes)])

    def hold(self, ranges: list[tuple[int, int]], *, behind: bool = False) -> None:
        """Back byte ranges ``(offset, nbytes)`` with memory.

        Args:
            ranges: page-aligned; each is given huge pages of its own where it has room for them.
            behind: populate from a thread, front to back, while the caller goes on. What is touched before its turn
                is faulted in by the touch; the first answer need not wait for the whole to be zeroed.

        Raises:
            StorageError: the system has no such memory to give.
        """
        self.finish_populating()
        for offset, nbytes in ranges:
            # Only inside the range: a huge page across its end would hold more than was asked for.
            low = -(-(self.address + offset) // _HUGE) * _HUGE
            high = (self.address + offset + nbytes) // _HUGE * _HUGE
            if high > low:
                _madvise(low, high - low, _MADV_HUGEPAGE)
        if behind and not self._lock:
            arguments = (self._map, self.address, ranges, self._stop)
            self._populating = threading.Thread(target=_populate, args=arguments, name="narrowboat-populate")
            self._populating.daemon = True
            self._populating.start()
            return
        for offset, nbytes in ranges:
            problem = _madvise(self.address + offset, nbytes, _MADV_POPULATE_WRITE)
            if problem in (errno.ENOMEM, errno.EFAULT):
                raise StorageError(
                    f"cannot populate {format_bytes(nbytes)} of memory: {os.strerror(problem)}; lower the budget"
                )
            if problem:  # a kernel before 5.14
                for at in range(offset, offset + nbytes, PAGE):
                    self._map[at] = self._map[at]
            if self._lock:
                self.locked &= _libc().mlock(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(nbytes)) == 0

    def small_pages(self) -> None:
        """Never take a huge page: what is held is then exactly what was touched, page by page."""
        _madvise(self.address, self.nbytes, _MADV_NOHUGEPAGE)

    def release(self, ranges: list[tuple[int, int]]) -> None:
        """Give the memory of byte ranges ``(offset, nbytes)`` back to the system; they read as zeros afterwards."""
        self.finish_populating(give_up=True)
        for offset, nbytes in ranges:
            if self._lock:
                _libc().munlock(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(nbytes))
            _madvise(self.address + offset, nbytes, _MADV_DONTNEED)

    def copy(self, offset: int, target: int, nbytes: int) -> None:
        """Copy ``nbytes`` bytes within the slab; the ranges do not overlap."""
        ctypes.memmove(self.address + target, self.address + offset, nbytes)

    def bytes_at(self, offset: int, nbytes: int) -> memoryview:
        """The writable bytes ``[offset, offset + nbytes)``, by reference."""
        return self._view[offset : offset + nbytes]

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A contiguous tensor over the bytes at ``offset``, by reference, with a storage object of its own.

        Made outside ``inference_mode`` whatever the caller's mode, so that it is an ordinary tensor.
        """
        with torch.inference_mode(False), torch.no_grad():
            count = 1
            for size in shape:
                count *= size
            if count == 0:
                return torch.empty(shape, dtype=dtype)
            # .data: without a record of the flat tensor it is a view of, which would count as a view kept.
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape).data

    def __del__(self) -> None:
        if "_stop" in self.__dict__:
            self._stop.set()
        forget(getattr(self, "_ticket", 0))

    def close(self) -> None:
        """Give the memory back to the system: at once, or when the last tensor that refers to it goes.

        The mapping is not closed by hand: ``torch.frombuffer`` keeps the mapping object alive, but not locked.
        """
        forget(self._ticket)
        self.finish_populating(give_up=True)
        self._view.release()
        self.__dict__.pop("_map", None)

    def finish_populating(self, *, give_up: bool = False) -> None:
        """Wait for the thread that populates, or stop it."""
        if self._populating is not None:
            if give_up:
                self._stop.set()
            self._populating.join()
            self._populating = None
            self._stop.clear()


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _madvise(address: int, nbytes: int, advice: int) -> int:
    """0 or an errno. Through ctypes, which lets go of the interpreter's lock; Python's own madvise does not."""
    failed = _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(advice))
    return ctypes.get_errno() if failed else 0


def _populate(keep_mapped: mmap.mmap, address: int, ranges: list[tuple[int, int]], stop: threading.Event) -> None:
    # ``keep_mapped`` is held so that the addresses stay valid. Where the call is refused, pages come when touched.
    for offset, nbytes in ranges:
        for at in range(offset, offset + nbytes, _PIECE):
            if stop.is_set():
                return
            _madvise(address + at, min(_PIECE, offset + nbytes - at), _MADV_POPULATE_WRITE)
