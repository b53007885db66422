"""Expert stacks are known by what operators do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrowboat as nb
from experts_kit import Bank, Gathered, Grouped, Layers
from narrowboat.profile.experts import find_experts, span, without_experts
from narrowboat.profile.rowwise import takes_rows
from narrowboat.stream.prepare import Prepared, prepare

aten = torch.ops.aten
STACK = torch.zeros(4, 3, 2)
IDS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("func", "args", "rows"),
    [
        (aten.select.int, (STACK, 0, 1), True),
        (aten.select.int, (STACK, -3, 1), True),
        (aten.select.int, (STACK, 1, 1), False),
        (aten.index.Tensor, (STACK, [IDS]), True),
        (aten.index.Tensor, (STACK, [IDS > 0]), False),
        (aten.index.Tensor, (STACK, [IDS, IDS]), False),
        (aten.index_select.default, (STACK, 0, IDS), True),
        (aten.index_select.default, (STACK, 2, IDS), False),
        (aten.transpose.int, (STACK, -2, -1), True),
        (aten.transpose.int, (STACK, 0, 1), False),
        (aten._grouped_mm.default, (torch.zeros(5, 3), STACK, IDS), True),
        (aten._grouped_mm.default, (torch.zeros(4, 5, 3), STACK), False),
        (aten.bmm.default, (torch.zeros(4, 5, 3), STACK), False),
        (aten.sum.default, (STACK,), False),
        (aten.detach.default, (STACK,), True),
    ],
)
def test_operators_that_take_single_matrices(func: Any, args: tuple[Any, ...], rows: bool) -> None:
    assert takes_rows(func, args, STACK) is rows


class Both(Bank):
    """Looks at all of one stack, and at single matrices of the other."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return x * self.up.mean() + torch.einsum("nkhi,nh->nh", self.down[chosen], x)


def made(folder: Path, factory: Callable[[], nn.Module], *, traced: bool = True) -> Prepared:
    path = folder / "weights.safetensors"
    nb.pack(factory().state_dict(), path, overwrite=True)
    return prepare(factory, path, ((torch.zeros(2, 128),), {}) if traced else None)


def found(prepared: Prepared) -> list[tuple[str, int, list[str]]]:
    experts = find_experts(prepared.module, prepared.matched, prepared.trace)
    if experts is None:
        return []
    return [
        (s.name, s.count, [prepared.weights[w].name.rpartition(".")[2] for w in s.weights]) for s in experts.stacks
    ]


@pytest.mark.parametrize("bank", [Gathered, Grouped])
def test_stacks_are_found_in_the_order_of_their_use(tmp_path: Path, bank: type[nn.Module]) -> None:
    stacks = found(made(tmp_path, lambda: Layers(depth=2, bank=bank)))
    assert stacks == [(f"banks.{i}", 8, ["up", "down"]) for i in range(2)]


def test_a_stack_that_is_looked_at_as_a_whole_is_none(tmp_path: Path) -> None:
    assert found(made(tmp_path, lambda: Layers(depth=1, bank=Both))) == [("banks.0", 8, ["down"])]


def test_without_a_trace_two_that_agree_are_taken_for_stacks(tmp_path: Path) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = nn.Parameter(torch.zeros(8, 128, 128))
            self.conv = nn.Conv1d(128, 128, 3)

    assert found(made(tmp_path, lambda: Layers(depth=1), traced=False)) == [("banks.0", 8, ["up", "down"])]
    assert found(made(tmp_path, Single, traced=False)) == []


def test_small_rows_stay_with_their_stacks(tmp_path: Path) -> None:
    assert found(made(tmp_path, lambda: Layers(depth=1, bank=lambda n: Grouped(n, inner=63)))) == []  # type: ignore[arg-type]
    assert found(made(tmp_path, lambda: Layers(depth=1, bank=lambda n: Grouped(n, inner=64)))) != []  # type: ignore[arg-type]


def test_sizes_are_those_of_whole_pages(tmp_path: Path) -> None:
    prepared = made(tmp_path, lambda: Layers(depth=2, bank=lambda n: Grouped(n, inner=68)))  # type: ignore[arg-type]
    experts = find_experts(prepared.module, prepared.matched, prepared.trace)
    assert experts is not None
    row = 68 * 128 * 4  # 8.5 pages
    up = prepared.weights[experts.stacks[0].weights[0]]
    assert [span(up, e) for e in (0, 1)] == [(0, 36864), (32768, 69632)]
    assert span(up, 7)[1] >= 8 * row
    assert experts.least == 36864 and experts.total == 2 * 2 * 8 * 36864
    assert experts.comfort == 2 * 2 * 36864 and experts.demand == 2 * experts.comfort


def test_a_trace_without_experts_is_the_same_walk(tmp_path: Path) -> None:
    prepared = made(tmp_path, lambda: Layers(depth=2, bank=Grouped))
    experts, trace = find_experts(prepared.module, prepared.matched, prepared.trace), prepared.trace
    assert experts is not None and trace is not None
    less = without_experts(trace, experts, prepared.weights)
    assert less.events == trace.events
    assert experts.weights and not experts.weights & {w for used in less.uses for w in used}
    assert sum(less.traffic) < sum(trace.traffic)
    assert less.activation_bytes >= trace.activation_bytes
