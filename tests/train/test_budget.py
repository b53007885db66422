"""The budget in force."""

from __future__ import annotations

import pytest

from narrowboat.errors import BudgetError
from narrowboat.train.budget import BudgetInForce


def test_a_refusal_tells_what_was_given_only_where_less_is_in_force() -> None:
    budget = BudgetInForce("100MiB", adapt=False)
    with pytest.raises(BudgetError) as plain, budget.told():
        raise BudgetError("too small", minimum=7, limiter="conv1")
    assert str(plain.value) == "too small"
    budget.lower(60 << 20)
    with pytest.raises(BudgetError, match=r"too small; 100 MiB were given") as lowered, budget.told():
        raise BudgetError("too small", minimum=7, limiter="conv1")
    assert (lowered.value.minimum, lowered.value.limiter) == (7, "conv1")
