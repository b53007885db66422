"""Batches that cannot be cut along dimension 0 are trained as a whole, with the plain step's bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from narrowboat.errors import TrainingError
from narrowboat.train.step import train_step
from narrowboat.train.uncut import can_be_cut


class Graph(nn.Module):
    """Two graph convolutions: nodes in dimension 0, and an adjacency matrix of nodes x nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, nodes: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(adjacency @ self.first(nodes))
        return adjacency @ self.second(hidden)


class SequenceFirst(nn.Module):
    """An LSTM over (time, batch, features); one target for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(8, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor | PackedSequence) -> torch.Tensor:
        return self.head(self.body(x)[1][0][-1])


def graph() -> tuple[nn.Module, Any, torch.Tensor]:
    adjacency = torch.rand(40, 40).softmax(1)
    return Graph(), (torch.randn(40, 16), adjacency), torch.randint(4, (40,))


def sequences() -> tuple[nn.Module, Any, torch.Tensor]:
    return SequenceFirst(), torch.randn(12, 5, 8), torch.randint(4, (5,))


def packed() -> tuple[nn.Module, Any, torch.Tensor]:
    x = pack_padded_sequence(torch.randn(12, 5, 8), torch.tensor([12, 9, 7, 7, 2]))
    return SequenceFirst(), x, torch.randint(4, (5,))


@pytest.mark.usefixtures("small_things_count")
@pytest.mark.parametrize("made", [graph, sequences, packed])
def test_a_batch_that_cannot_be_cut_is_trained_whole_at_any_budget(
    made: Callable[[], tuple[nn.Module, Any, torch.Tensor]],
) -> None:
    torch.manual_seed(0)
    model, inputs, targets = made()
    plain = copy.deepcopy(model)
    arguments = inputs if type(inputs) is tuple else (inputs,)
    losses = []
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(*arguments), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    step = train_step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1), budget="1GiB", adapt=False)
    least = step.prepare(inputs, targets).min_budget
    told = [step(inputs, targets).item()]
    step.budget = least
    told += [step(inputs, targets).item() for _ in range(2)]
    assert told == losses
    assert step.plan.parts == 1
    assert any("cannot be cut" in reason for reason in step.plan.refused)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_micro_batches_of_a_batch_that_cannot_be_cut_are_refused() -> None:
    model, inputs, targets = graph()
    step = train_step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1), budget="1GiB", micro_batches=4)
    with pytest.raises(TrainingError):
        step(inputs, targets)


def test_a_model_that_fails_on_every_batch_is_not_taken_for_one_that_cannot_be_cut() -> None:
    assert can_be_cut(nn.Linear(3, 3), F.mse_loss, torch.randn(8, 5), torch.randn(8, 3))
