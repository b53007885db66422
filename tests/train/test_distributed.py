"""Two gloo processes make one step: gradients of the whole batch, one synchronisation, all of them or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from narrowboat.train.distributed import Ranks
from narrowboat.train.loss import LossPlan
from ranks_kit import run_ranks

Found = dict[str, list[dict[str, Any]]]
COMPARED = [
    "equal_parts",
    "several_micro_batches",
    "unequal_counts_and_plans",
    "sum_and_count",
    "sums",
    "one_budget_too_small",
    "one_loss_not_finite",
    "one_without_memory",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", COMPARED)
def test_weights_and_losses_are_those_of_one_process_with_the_whole_batch(found: Found, name: str) -> None:
    for rank in found[name]:
        assert rank["apart"] < 1e-12
        for loss, alone in rank["losses"]:
            assert loss == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("name", ["equal_parts", "several_micro_batches", "unequal_counts_and_plans", "sum_and_count"])
def test_each_bucket_is_reduced_once_per_step(found: Found, name: str) -> None:
    for rank in found[name]:
        buckets = max(rank["reduced"]) + 1
        assert buckets > 1
        # The first step may have other buckets than the later ones, which follow the order of the gradients.
        assert sorted(rank["reduced"][-2 * buckets :]) == sorted(2 * [*range(buckets)])
        assert rank["reduced"].count(0) == len(rank["losses"])


def test_plans_of_the_ranks_may_differ(found: Found) -> None:
    assert [rank["parts"] for rank in found["unequal_counts_and_plans"]] == [1, 3]


def test_a_budget_too_small_on_one_rank_is_refused_on_all(found: Found) -> None:
    first, second = found["one_budget_too_small"]
    assert first["kind"] == second["kind"] == "BudgetError"
    assert first["minimum"] == second["minimum"] > 4096
    assert first["message"].startswith("rank 1 does not make this step")
    assert "rank" not in second["message"]


def test_a_loss_that_is_not_finite_on_one_rank_is_refused_on_all(found: Found) -> None:
    assert [rank["kind"] for rank in found["one_loss_not_finite"]] == ["LossError", "LossError"]


def test_all_ranks_repeat_a_step_for_which_one_had_no_memory(found: Found) -> None:
    assert [rank["repeated"] for rank in found["one_without_memory"]] == [1, 1]


def test_batch_norm_has_the_bits_of_the_plain_replicas(found: Found) -> None:
    for rank in found["batch_norm_as_replicas_have_it"]:
        assert rank["same"]
        assert rank["replays"] > 0
        assert rank["departed"] == ""


def test_one_process_asks_nobody() -> None:
    ranks = Ranks(nn.Linear(1, 1))
    assert ranks.world == 1
    assert ranks.factor(LossPlan("sum", ""), torch.zeros(2, 1), None) == 1.0
    assert ranks.summed([2, torch.tensor(3.0)]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="own"), ranks.together():
        raise ValueError("own")
