"""The C library's memory functions, with their types, once for all who call them."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def libc() -> Any:
    """The library that this process runs on. ``malloc_trim`` and ``mallopt`` are there only where it is glibc."""
    found = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    _typed(found, "malloc", address, size)
    _typed(found, "free", None, address)
    _typed(found, "sbrk", address, ctypes.c_ssize_t)
    _typed(found, "madvise", ctypes.c_int, address, size, ctypes.c_int)
    _typed(found, "mallopt", ctypes.c_int, ctypes.c_int, ctypes.c_int)
    _typed(found, "malloc_trim", ctypes.c_int, size)
    return found


def _typed(found: Any, name: str, result: Any, *arguments: Any) -> None:
    try:
        function = getattr(found, name)
    except AttributeError:  # another C library
        return
    function.restype, function.argtypes = result, list(arguments)
