"""Foreseeing the next stack's experts: by its router, only where it pays, and never changing an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrowboat as nb
from experts_kit import Grouped
from narrowboat.profile.experts import Stack
from narrowboat.stream.forecast import Forecast


class Beside(nn.Module):
    """A router and its experts side by side, as in transformers."""

    def __init__(self, count: int = 16) -> None:
        super().__init__()
        self.gate = nn.Linear(128, count, bias=False)
        self.experts = Grouped(count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.gate(x).topk(2, dim=-1).indices)


class Deep(nn.Module):
    """Layers that change their input little (or all of it), so that routing is (not) foreseeable."""

    def __init__(self, share: float = 0.001, depth: int = 4) -> None:
        super().__init__()
        self.share = share
        self.layers = nn.ModuleList(Beside() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x * (self.share < 1) + self.share * layer(x)
        return x


def stacks_of(model: nn.Module) -> tuple[list[Stack], dict[int, int], list[Any]]:
    from narrowboat.arena.slot import Weight

    numbers: dict[int, int] = {}
    weights = []
    stacks = []
    for name, parameter in model.named_parameters():
        numbers[id(parameter)] = len(weights)
        weights.append(Weight(len(weights), name, None))  # type: ignore[arg-type]
    for name, child in model.named_modules():
        if isinstance(child, Grouped):
            stacks.append(Stack(name, 16, (numbers[id(child.up)], numbers[id(child.down)])))
    return stacks, numbers, weights


def test_a_router_is_the_one_matrix_beside_the_stack_with_a_row_per_expert() -> None:
    model = Deep()
    stacks, numbers, weights = stacks_of(model)
    forecast = Forecast(model, stacks, numbers, weights)
    assert [router and router.name for router in forecast._routers] == [f"layers.{i}.gate.weight" for i in range(4)]
    model.layers[1].second = nn.Linear(128, 16)
    stacks, numbers, weights = stacks_of(model)
    assert Forecast(model, stacks, numbers, weights)._routers[1] is None


@pytest.mark.parametrize(("right", "busy", "pays"), [(6, 0.2, True), (6, 0.7, False), (3, 0.0, False), (8, 0.6, True)])
def test_a_forecast_pays_where_it_is_right_more_often_than_storage_is_busy(
    right: int, busy: float, pays: bool
) -> None:
    model = Deep()
    forecast = Forecast(model, *stacks_of(model))
    assert not forecast.expect(1, [0], 0.0, 0.0)  # nothing is known yet
    for _ in range(3):
        forecast.expect(1, list(range(8)), busy, 0.1)
        forecast.judge(1, list(range(8 - right, 16)))
    assert forecast.expect(1, [0], busy, 0.1) is pays
    assert not forecast.expect(2, [0], busy, 0.1)  # each stack for itself


def test_what_is_known_fades() -> None:
    model = Deep()
    forecast = Forecast(model, *stacks_of(model))
    for wanted in ([0], [9]):
        for _ in range(300):
            forecast.expect(1, [0], 0.0, 0.0)
            forecast.judge(1, wanted)
        assert forecast.expect(1, [0], 0.0, 0.0) is (wanted == [0])


def streamed(folder: Path, share: float) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    plain = Deep(share)
    path = folder / "weights.safetensors"
    nb.pack(plain.state_dict(), path)
    example = (torch.zeros(1, 128),)
    with pytest.raises(nb.BudgetError) as caught:
        nb.stream(lambda: Deep(share), path, budget=1, example=example)
    return nb.stream(lambda: Deep(share), path, budget=caught.value.minimum + (5 << 20), example=example), plain


def run(folder: Path, share: float) -> dict[str, Any]:
    model, plain = streamed(folder, share)
    with nb.session(model) as session, torch.inference_mode():
        session.experts._busy = 0.0  # of an idle machine
        session.experts._looked = (1e18, 0.0)
        for _ in range(60):
            x = torch.randn(1, 128)
            assert torch.equal(model(x), plain(x))
            assert session.experts.held <= session.experts.capacity
        stats: dict[str, Any] = session.stats()
        return stats


def test_routing_that_hardly_changes_is_foreseen(tmp_path: Path) -> None:
    stats = run(tmp_path, 0.001)
    assert stats["expert_bytes_ahead"] > 0
    assert stats["expert_bytes_foreseen"] > 0.8 * stats["expert_bytes_ahead"]


def test_routing_that_changes_entirely_is_not_read_ahead(tmp_path: Path) -> None:
    stats = run(tmp_path, 1.0)
    assert stats["expert_bytes_ahead"] < 0.05 * stats["expert_bytes_read"]


def test_several_tokens_at_once_are_not_foreseen(tmp_path: Path) -> None:
    model, plain = streamed(tmp_path, 0.001)
    with nb.session(model) as session, torch.inference_mode():
        session.experts._busy, session.experts._looked = 0.0, (1e18, 0.0)
        for _ in range(20):
            x = torch.randn(3, 128)
            assert torch.equal(model(x), plain(x))
        assert session.stats()["expert_bytes_ahead"] == 0
        assert all(record.foreseen == 0 for record in session.experts._forecast.records)
