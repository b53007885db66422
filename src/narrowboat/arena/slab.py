"""One slab of memory per session: anonymous, page-aligned, populated before it is needed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

import torch

from narrowboat.arena.exports import forget, watch
from narrowboat.errors import StorageError
from narrowboat.quantities import format_bytes

PAGE = 4096
_HUGE = 2 << 20
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", 14)
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python 3.11's mmap module
_PIECE = 16 << 20  # bytes populated at a time behind the caller's back


class Slab:
    """Anonymous memory handed out as tensor views by reference.

    Args:
        nbytes: size in bytes; rounded up to a page.
        lock: keep it from being swapped out (``mlock``).
        behind: populate from a thread, front to back, while the caller goes on. What is touched before its turn is
            faulted in by the touch; the first answer need not wait for the whole to be zeroed.

    Attributes:
        locked: whether locking was asked for and granted.
        huge: whether huge pages were advised.

    Raises:
        StorageError: the system has no such memory to give.
    """

    def __init__(self, nbytes: int, *, lock: bool = False, behind: bool = False) -> None:
        self.nbytes = max(-(-nbytes // PAGE) * PAGE, PAGE)
        try:
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise StorageError(
                f"cannot reserve {format_bytes(nbytes)} of memory: {error.strerror}; lower the budget"
            ) from error
        self._view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Below one huge page the advice can only make the slab larger than asked for.
        self.huge = self.nbytes >= _HUGE and self._advise(_MADV_HUGEPAGE)
        self._stop = threading.Event()
        self._populating: threading.Thread | None = None
        if behind and not lock:
            arguments = (self._map, self.address, self.nbytes, self._stop)
            self._populating = threading.Thread(
                target=_populate, args=arguments, name="narrowboat-populate", daemon=True
            )
            self._populating.start()
        elif not self._advise(_MADV_POPULATE_WRITE):
            for offset in range(0, self.nbytes, PAGE):
                self._map[offset] = 0
        self._ticket = watch(self.address, self.nbytes)
        self.locked = (
            lock
            and ctypes.CDLL(None, use_errno=True).mlock(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes))
            == 0
        )

    def _advise(self, advice: int) -> bool:
        try:
            self._map.madvise(advice)
        except OSError as error:
            if error.errno in (errno.ENOMEM, errno.EFAULT):
                raise StorageError(
                    f"cannot populate {format_bytes(self.nbytes)} of memory: {os.strerror(error.errno)}; "
                    "lower the budget"
                ) from error
            return False
        return True

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
        if give_up:
            self._stop.set()
        if self._populating is not None:
            self._populating.join()
            self._populating = None


def _populate(keep_mapped: mmap.mmap, address: int, nbytes: int, stop: threading.Event) -> None:
    # Through ctypes, which lets go of the interpreter's lock; Python's own madvise does not. ``keep_mapped`` is held
    # so that the addresses stay valid. Where the call is refused, pages come when they are touched.
    madvise = ctypes.CDLL(None).madvise
    for at in range(0, nbytes, _PIECE):
        if stop.is_set():
            return
        piece = min(_PIECE, nbytes - at)
        madvise(ctypes.c_void_p(address + at), ctypes.c_size_t(piece), ctypes.c_int(_MADV_POPULATE_WRITE))
