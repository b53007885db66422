"""One idea at a time taken away: what remains is the same code without it.

============== =====================================================================================
ablation       what is different
============== =====================================================================================
``buffered``   weights are read through the page cache, which is dropped behind each read
``no prefetch``a block is read when it is needed, not before
``no wrap``    reading does not go on into the next pass
``copied``     the file is not packed: weights are read into a staging buffer and copied to their place
``small pages``the arena asks the system for no huge pages
============== =====================================================================================

Without residency every byte of the budget is window: that is ``scheme="window"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import narrowboat.arena.slab
from narrowboat.stream.prefetch import Prefetcher

_MADV_NOHUGEPAGE = 15
Ablation = Callable[[], AbstractContextManager[dict[str, Any]]]


@contextmanager
def _nothing(**options: Any) -> Iterator[dict[str, Any]]:
    yield options


@contextmanager
def _no_prefetch() -> Iterator[dict[str, Any]]:
    with mock.patch.object(Prefetcher, "advance", lambda self: None):
        yield {}


@contextmanager
def _no_wrap() -> Iterator[dict[str, Any]]:
    with mock.patch.object(Prefetcher, "wraps", False):
        yield {}


@contextmanager
def _small_pages() -> Iterator[dict[str, Any]]:
    with mock.patch.object(narrowboat.arena.slab, "_MADV_HUGEPAGE", _MADV_NOHUGEPAGE):
        yield {}


ABLATIONS: dict[str, Ablation] = {
    "": _nothing,
    "buffered": lambda: _nothing(io="buffered"),
    "no prefetch": _no_prefetch,
    "no wrap": _no_wrap,
    "copied": lambda: _nothing(unpacked=True),
    "small pages": _small_pages,
}
