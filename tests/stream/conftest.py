"""What the tests of streaming share: the benchmark's architecture kit, and blocks small enough to have to swap."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks far smaller than a user's, so that small models swap as large ones do."""
    from narrowboat.profile import workload

    monkeypatch.setattr(workload, "SMALL", 1 << 9)
    monkeypatch.setattr(workload, "TARGET", 1 << 10)
