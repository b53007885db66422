"""Batch over a cluster: a data set of Ray Data through a model, both of them larger than memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowboat.cluster.dataset.api import map_dataset
    from narrowboat.cluster.dataset.stats import MapStats, NodeStats
    from narrowboat.errors import RowError

__all__ = ["MapStats", "NodeStats", "RowError", "map_dataset"]
_HOME = {"MapStats": "stats", "NodeStats": "stats", "RowError": "rows", "map_dataset": "api"}


def __getattr__(name: str) -> Any:
    # Late, as in narrowboat itself: the keeper of the workers does without PyTorch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
