"""What a run did, measured and drawn: predicted against measured, the same bits, the timeline; reports of all of it.

For notebooks: ``narrowboat.report.plots`` draws, ``load`` and ``load_all`` read what commands wrote, and
``MemorySamples`` looks at memory while something runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowboat.report.memory_samples import MemorySamples
    from narrowboat.report.records.find import load, load_all

__all__ = ["MemorySamples", "load", "load_all"]

_LAZY = {
    "MemorySamples": "narrowboat.report.memory_samples",
    "load": "narrowboat.report.records.find",
    "load_all": "narrowboat.report.records.find",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
