"""What tests of whole training steps share."""

from __future__ import annotations

import pytest


@pytest.fixture
def small_things_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's margins and thresholds are for models of gigabytes; those of tests are of kilobytes."""
    monkeypatch.setattr("narrowboat.train.plan.MARGIN_LEAST", 1 << 10)
    monkeypatch.setattr("narrowboat.train.step._IN_FLIGHT", 1 << 10)
    monkeypatch.setattr("narrowboat.train.footprint.Footprint.left_behind", lambda self: 0)
    monkeypatch.setattr("narrowboat.train.spill.SpillPool.staging_bytes", 1 << 10)
    monkeypatch.setattr("narrowboat.train.step.measure_bandwidth", lambda folder: (1e9, 1e9))
    monkeypatch.setattr("narrowboat.train.measure.chain._SMALLEST_SPILL", 1 << 10)
