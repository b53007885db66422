"""Errors cross between processes whole."""

from __future__ import annotations

import copy
import pickle

import pytest

from narrowboat import errors


@pytest.mark.parametrize(
    "error",
    [
        errors.BudgetError("too small", minimum=5, limiter="the head"),
        errors.MapError("input 3 failed", index=3, indices=(3, 4)),
        errors.BeyondContractError("too many", retry_after=0.5, details={"a": 1}),
        errors.PlacementError("no room", {"task": {"node": "why"}}),
        errors.UsageError("wrong"),
    ],
)
def test_an_error_is_pickled_with_all_that_it_tells(error: errors.NarrowboatError) -> None:
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)
