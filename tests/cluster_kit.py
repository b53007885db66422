"""A Ray cluster of several nodes on this machine, whose nodes find the tests' own helpers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from narrowboat.cluster import local
from narrowboat.cluster.local import LocalCluster, LocalNode
from narrowboat.cluster.settings import MEMORY

__all__ = ["MEMORY", "MIB", "LocalCluster", "LocalNode", "local_cluster"]
MIB = 1 << 20
# Before any test imports Ray: everything listens on, and is called at, 127.0.0.1.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


@contextlib.contextmanager
def local_cluster(budgets: Sequence[tuple[str, int]], *, head_cpus: float = 1) -> Iterator[LocalCluster]:
    """See ``narrowboat.cluster.local``; tests are skipped where there is no Ray."""
    pytest.importorskip("ray", reason="several machines need narrowboat[ray]")
    paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    with local.local_cluster(budgets, head_cpus=head_cpus) as made:
        yield made
