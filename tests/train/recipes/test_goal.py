"""What a model can learn, told by a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from narrowboat.errors import ModelError, UsageError
from narrowboat.train.recipes.goal import Goal, Kind, find_goal, logits_of


class Pool(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def _images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def _tokens(pool: bool = False) -> nn.Module:
    return nn.Sequential(nn.Embedding(300, 8), nn.Dropout(0.5), *([Pool()] if pool else []), nn.Linear(8, 300))


IMAGE_EXAMPLE = (torch.zeros(1, 3, 16, 12),)
TOKEN_EXAMPLE = (torch.zeros(1, 16, dtype=torch.int64),)


def test_the_kind_is_told_by_what_goes_in_and_what_comes_out() -> None:
    goal = find_goal("m", _images(), IMAGE_EXAMPLE, text=False)
    assert (goal.kind, goal.shape, goal.outputs) == (Kind.IMAGES, (3, 16, 12), 5)
    assert find_goal("m", _images(), IMAGE_EXAMPLE, text=None, size=9).shape == (3, 9, 9)
    goal = find_goal("m", _tokens(), TOKEN_EXAMPLE, text=True, length=7)
    assert (goal.kind, goal.shape, goal.outputs) == (Kind.TOKENS, (7,), 300)
    assert find_goal("m", _tokens(pool=True), None, text=True).kind is Kind.TEXTS
    assert find_goal("m", _images(), None, text=False, native=(3, 8, 8)).shape == (3, 8, 8)


def test_looking_leaves_no_trace() -> None:
    model = _images().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    find_goal("m", model, IMAGE_EXAMPLE, text=False)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "example", "options", "error", "match"),
    [
        (_images(), IMAGE_EXAMPLE, {"text": True}, UsageError, "takes images, and the data is text"),
        (_tokens(), TOKEN_EXAMPLE, {"text": False}, UsageError, "takes token numbers, and the data is images"),
        (_images(), None, {"text": None}, UsageError, "--size or --length"),
        (_images(), None, {"text": False}, UsageError, "give --size"),
        (_images(), IMAGE_EXAMPLE, {"text": False, "length": 3}, UsageError, "--length is for"),
        (_tokens(), TOKEN_EXAMPLE, {"text": True, "size": 3}, UsageError, "--size"),
        (nn.Linear(4, 4), (torch.zeros(1, 4),), {"text": False}, UsageError, "2 dimensions"),
        (_images(), IMAGE_EXAMPLE, {"text": False, "size": 1}, ModelError, "does not run on inputs of shape"),
        (nn.Conv2d(3, 4, 3), IMAGE_EXAMPLE, {"text": False}, ModelError, "scores of shape"),
        (nn.LSTM(3, 3), (torch.zeros(1, 1, 3, 3),), {"text": False, "size": 3}, ModelError, "m"),
    ],
)
def test_what_does_not_fit_is_said(
    model: nn.Module, example: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        find_goal("m", model, example, **options)


def test_a_transformers_model_is_told_by_its_name() -> None:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=300, num_labels=4
    )
    goal = find_goal("m", BertForSequenceClassification(config), None, text=True, length=6)
    assert (goal.kind, goal.argument, goal.outputs) == (Kind.TEXTS, "input_ids", 4)
    inputs, targets = goal.random_batch(3)
    assert {name: list(value.shape) for name, value in inputs.items()} == {
        "input_ids": [3, 6],
        "attention_mask": [3, 6],
    }
    assert targets.shape == (3,)
    with pytest.raises(ModelError, match="BertForMaskedLM"):
        find_goal("m", BertForMaskedLM(config), None, text=True)


@pytest.mark.parametrize("model", [_images(), _tokens(), _tokens(pool=True)])
def test_loss_and_score_agree_on_a_batch(model: nn.Module) -> None:
    text = not isinstance(model[0], nn.Conv2d)  # type: ignore[index]
    goal = find_goal("m", model, None, text=text, native=(3, 8, 8))
    inputs, targets = goal.random_batch(6)
    model.eval()
    with torch.no_grad():
        mean = goal.loss(model(inputs), targets).item()
    summed, right, count = goal.score(model, inputs, targets)
    assert count == targets.numel()
    assert 0 <= right <= count
    assert summed / count == pytest.approx(mean, rel=1e-5)


def test_a_perfect_answer_is_right_everywhere() -> None:
    class Echo(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.one_hot(ids + 1, 9).float() * 50

    goal = Goal(Kind.TOKENS, (3,), 9)
    inputs, targets = goal.collate([torch.tensor([1, 2, 3, 4]), torch.tensor([4, 5, 6, 7])])
    loss, right, count = goal.score(Echo(), inputs, targets)
    assert (right, count) == (6, 6)
    assert loss < 1e-6


def test_scores_are_found_in_common_outputs_and_half_precision_is_widened() -> None:
    scores = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert logits_of({"logits": scores}).dtype == torch.float32
    assert logits_of(scores.double()).dtype == torch.float64
    for wrong in ((scores,), {"features": scores}, torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ModelError, match="needs scores"):
            logits_of(wrong)


def test_more_classes_than_outputs_are_refused() -> None:
    goal = Goal(Kind.IMAGES, (3, 8, 8), 10)
    goal.check_classes(10, "data")
    with pytest.raises(UsageError, match="data has 11 classes, and the model tells 10 apart"):
        goal.check_classes(11, "data")
