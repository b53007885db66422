"""The parameter-use trace: which weights each step of a pass really uses, wherever the code that uses them stands."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrowboat as nb
from narrowboat.checkpoint import open_index
from narrowboat.machine.malloc import MallocPolicy
from narrowboat.profile.memory import activation_parts, fault_seconds
from narrowboat.profile.skeleton import build_skeleton, match_weights
from narrowboat.profile.use_trace import ENTER, TraceError, UseTrace, trace_uses

X = torch.zeros(2, 8)


class Traced:
    """A trace with the names of weights and modules instead of numbers."""

    def __init__(self, factory: Any, folder: Path, *args: Any) -> None:
        nb.pack(factory().state_dict(), folder / "w.safetensors")
        self.module = build_skeleton(factory)
        matched = match_weights(self.module, open_index(folder / "w.safetensors"))
        self.names = [weight.name for weight in matched.weights]
        self.modules = [name or "model" for name, _ in self.module.named_modules()]
        self.trace: UseTrace = trace_uses(self.module, matched.numbers, args or (X,), {})

    @property
    def steps(self) -> list[tuple[str, list[str]]]:
        """``("+layer" or "-layer", names used)`` for each step."""
        return [
            (("+" if kind == ENTER else "-") + self.modules[number], [self.names[w] for w in used])
            for (number, kind), used in zip(self.trace.events, self.trace.uses, strict=True)
        ]

    @property
    def order(self) -> list[str]:
        return [self.names[w] for w in self.trace.execution_order()]


class TwoLayers(nn.Module):
    """Two layers and an activation without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(8, 8), nn.Linear(8, 8)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.relu(self.first(x)))


def test_steps_are_cut_at_every_entry_and_exit_of_a_module_with_weights(tmp_path: Path) -> None:
    assert Traced(TwoLayers, tmp_path).steps == [
        ("+model", []),
        ("+first", ["first.weight", "first.bias"]),
        ("-first", []),
        ("+second", ["second.weight", "second.bias"]),
        ("-second", []),
        ("-model", []),
    ]


def test_the_order_is_of_use_and_not_of_registration(tmp_path: Path) -> None:
    assert Traced(TwoLayers, tmp_path).order == ["first.weight", "first.bias", "second.weight", "second.bias"]


def test_a_weight_used_by_another_modules_code_belongs_to_that_step(tmp_path: Path) -> None:
    class Borrows(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.first(x), self.second.weight)

    steps = dict(Traced(Borrows, tmp_path).steps)
    assert steps["-first"] == ["second.weight"]
    assert "second.bias" not in [name for used in steps.values() for name in used]


def test_a_view_used_later_holds_its_weight_until_then(tmp_path: Path) -> None:
    class Keeps(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half = self.second.weight[:4].t()
            x = self.first(self.first(x))
            return x @ half

    traced = Traced(Keeps, tmp_path)
    weight = traced.names.index("second.weight")
    assert [(first, last) for w, first, last in traced.trace.holds if w == weight] == [(0, 4)]


def test_a_tied_weight_is_one_weight_with_every_use(tmp_path: Path) -> None:
    class Tied(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.second.weight = self.first.weight

    traced = Traced(Tied, tmp_path)
    assert len(traced.names) == 3
    used = [name for _, step in traced.steps for name in step]
    assert used.count(traced.names[0]) == 2


def test_a_shared_module_is_an_event_each_time(tmp_path: Path) -> None:
    class Again(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(self.second(self.first(x)))

    assert [event for event, used in Traced(Again, tmp_path).steps if used] == ["+first", "+second", "+first"]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, functools.partial(nn.InstanceNorm1d, track_running_stats=True)])
def test_running_statistics_are_not_written_in_evaluation(tmp_path: Path, kind: Any) -> None:
    traced = Traced(lambda: nn.Sequential(kind(4)).eval(), tmp_path, torch.zeros(3, 4, 5))
    assert traced.trace.written == set()
    assert {"0.running_mean", "0.running_var"} <= set(traced.order)


def test_weights_written_in_place_are_noted(tmp_path: Path) -> None:
    class Counts(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.first.weight.data.mul_(0.5)
            return self.first(x)

    traced = Traced(Counts, tmp_path)
    assert {traced.names[w] for w in traced.trace.written} == {"first.weight"}


def test_operations_and_activations_are_counted(tmp_path: Path) -> None:
    traced = Traced(TwoLayers, tmp_path, torch.zeros(1000, 8))
    assert sum(traced.trace.flops) == 2 * (2 * 1000 * 8 * 8)
    one = 1000 * 8 * 4
    assert 2 * one <= traced.trace.activation_bytes <= 4 * one
    assert traced.trace.output_bytes == one


def test_the_model_and_its_inputs_are_left_as_they_were(tmp_path: Path) -> None:
    class Caches(TwoLayers):
        cache: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = super().forward(x)
            x.add_(1)
            return self.cache

    x = torch.zeros(2, 8)
    traced = Traced(Caches, tmp_path, x)
    assert traced.module.cache is None
    assert "forward" not in traced.module.__dict__
    assert torch.equal(x, torch.zeros(2, 8))


@functools.lru_cache
def table(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float32)


def test_a_cached_function_keeps_no_fake_tensor(tmp_path: Path) -> None:
    class Tabled(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + table(8)

    Traced(Tabled, tmp_path)
    assert type(table(8)) is torch.Tensor
    assert table(8).sum().item() == 28


@pytest.mark.parametrize("why", ["data", "numpy", "error"])
def test_what_cannot_run_on_shapes_alone_says_so(tmp_path: Path, why: str, capfd: pytest.CaptureFixture[str]) -> None:
    class Looks(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            if why == "data" and x.sum() > 0:
                return x
            if why == "numpy":
                return torch.from_numpy(x.detach().numpy())
            raise ValueError("no such luck")

    with pytest.raises(TraceError):
        Traced(Looks, tmp_path)
    assert capfd.readouterr().err == ""


def test_entries_without_an_exit_are_closed_when_the_model_catches_an_error(tmp_path: Path) -> None:
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            raise ValueError

    class Catches(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.fails = Fails(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with contextlib.suppress(ValueError):
                self.fails(x)
            return self.first(x)

    assert [event for event, _ in Traced(Catches, tmp_path).steps] == [
        "+model", "+fails", "-fails", "+first", "-first", "-model",
    ]  # fmt: skip


def test_more_frugal_allocators_reserve_less_and_cost_more() -> None:
    trace = UseTrace(activation_bytes=100 << 20, taken=(400 << 20, 350 << 20, 300 << 20))
    policies = (MallocPolicy.DEFAULT, MallocPolicy.BALANCED, MallocPolicy.LEAN, MallocPolicy.STRICT)
    reserved = [sum(activation_parts(trace, policy).values()) for policy in policies]
    assert reserved == sorted(reserved, reverse=True)
    assert min(reserved) > 100 << 20
    costs = [fault_seconds(trace, policy) for policy in policies]
    assert costs == sorted(costs)
    assert costs[0] == 0.0
