"""Which batches share a measurement."""

from __future__ import annotations

import torch
from torch import nn

from narrowboat.train.signature import signature


def test_only_the_number_of_samples_may_differ() -> None:
    model = nn.Linear(4, 2)
    mine = signature(model, torch.zeros(3, 4), torch.zeros(3))
    assert signature(model, torch.zeros(7, 4), torch.zeros(7)) == mine
    assert signature(model, torch.zeros(3, 5), torch.zeros(3)) != mine
    assert signature(model, torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3)) != mine


def test_modes_trained_parameters_and_autocast_matter() -> None:
    model, x = nn.Sequential(nn.Linear(4, 2), nn.Dropout()), torch.zeros(3, 4)
    mine = signature(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert signature(model, x) != mine
    model[1].eval()
    assert signature(model, x) != mine
    model[1].train()
    model[0].bias.requires_grad_(False)
    assert signature(model, x) != mine
