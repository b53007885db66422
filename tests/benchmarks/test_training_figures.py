"""The pure parts of ``benchmarks/training.py``: its meters count what is held, and peers are compared fairly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from narrowboat.zoo.gpt import GPT
from training_kit.frontier import TOLERANCE, Point, against_static, fastest_within, pareto, points, sameness
from training_kit.measure import (
    GradientWatch,
    Ledger,
    LiveStorages,
    allocator_ledger,
    held_bytes,
    state_tensors,
    static_bytes,
)
from training_kit.models import WORKLOADS
from training_kit.report import write_markdown, write_plot
from training_kit.subjects import SUBJECTS, Job, Setting
from training_kit.verdicts import judge

POINTS = st.lists(
    st.builds(Point, st.just("x"), st.just("-"), st.integers(1, 20), st.integers(1, 20).map(float), st.booleans()),
    max_size=12,
)


def _point(peak: int, rate: float, exact: bool = True) -> Point:
    return Point("x", "-", peak, rate, exact)


@given(POINTS, st.integers(0, 21))
def test_the_fastest_within_a_peak_is_beaten_by_none_that_fits(candidates: list[Point], peak: int) -> None:
    fitting = [point for point in candidates if point.peak <= peak]
    best = fastest_within(candidates, peak)
    assert (best is None) == (not fitting)
    if best is not None:
        assert best in fitting and best.rate == max(point.rate for point in fitting)


@given(POINTS)
def test_the_front_is_what_no_other_point_beats(candidates: list[Point]) -> None:
    front = pareto(candidates)
    wanted = {
        (p.peak, p.rate)
        for p in candidates
        if not any(o.peak <= p.peak and o.rate >= p.rate and (o.peak, o.rate) != (p.peak, p.rate) for o in candidates)
    }
    assert {(p.peak, p.rate) for p in front} == wanted
    assert [p.peak for p in front] == sorted(p.peak for p in front)


def test_static_settings_are_met_at_their_own_peak_and_only_by_exact_gradients() -> None:
    static = [_point(10, 4.0), _point(6, 3.0), _point(3, 9.0, exact=False)]
    slower, faster, wrong = _point(9, 4.0 * (1 - 2 * TOLERANCE)), _point(11, 5.0), _point(5, 8.0, exact=False)
    met, missed = against_static([slower, faster, wrong], static)
    assert met.ours == slower and not met.passed
    assert missed.ours is None and missed.ratio is None and not missed.passed
    assert all(found.passed for found in against_static([_point(6, 4.0 * (1 - TOLERANCE / 2))], static[:2]))


def test_gradients_are_told_apart() -> None:
    plain = {"gradients": "a", "parameters": "p"}
    assert sameness({"gradients": "a"}, plain) == "bits"
    assert sameness({"gradients": "b", "difference": 3e-12}, plain) == "rounding"
    assert sameness({"gradients": "b", "difference": 0.02}, plain) == "other"
    assert sameness({"gradients": None, "difference": None, "parameters": "p"}, plain) == "bits"
    assert sameness({"gradients": None, "difference": None, "parameters": "q"}, plain) == "unknown"
    assert sameness({}, {}) == "unknown"


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=30), st.integers(0, 9))
def test_a_ledger_peaks_where_its_running_sum_does(changes: list[tuple[int, int]], start: int) -> None:
    ledger, held = Ledger(start), {}
    sums = [start]
    for key, nbytes in changes:
        if key in held:
            ledger.free(key, held.pop(key))
        else:
            held[key] = nbytes
            ledger.take(key, nbytes)
        sums.append(start + sum(held.values()))
    for since in range(len(sums)):
        assert ledger.peak(since) == max(sums[since:])
    ledger.keep(list(held))
    assert ledger.peak(kept=False) <= max(sums) - start


def test_what_was_there_before_the_ledger_lowers_only_the_whole() -> None:
    ledger = Ledger(100)
    ledger.free("old", 60)
    ledger.take("activation", 30)
    ledger.take("gradient", 20)
    ledger.keep(["gradient"])
    ledger.free("activation", 30)
    assert ledger.peak() == 100
    assert ledger.peak(1) == 90
    assert ledger.peak(kept=False) == 30
    assert ledger.peak(1, share=0.5) == 75  # 40 left over, 15, and 20


_INPUTS = torch.linspace(-1, 1, 512 * 64, dtype=torch.float64).reshape(512, 64)


class _Net(nn.Module):
    """Its activations are known: in the backward of the ReLU, what it kept, the gradient it reads and the one made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def _stepped(path: Path) -> tuple[Any, nn.Module, torch.optim.Optimizer, GradientWatch]:
    torch.manual_seed(0)
    module = _Net().double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        module(_INPUTS).sum().backward()
        optimizer.step()

    return step, module, optimizer, GradientWatch(module, optimizer, path, write=True)


def test_both_meters_agree_on_a_step_and_tell_activations_from_gradients(tmp_path: Path) -> None:
    with LiveStorages() as live:
        step, module, optimizer, watch = _stepped(tmp_path)
        watch.live = live
        step()
        watch.told()
        since = live.ledger.position()
        step()
        live.keep([*module.parameters(), *state_tensors(optimizer)])
    optimizer.zero_grad()
    watch.live = None
    watch.places.clear()
    blocks = allocator_ledger(step, watch, held_bytes(module, optimizer))
    hidden = 512 * 256 * 8
    storages = live.ledger.peak(since, kept=False)
    assert 3 * hidden <= storages <= 3.5 * hidden
    assert blocks.peak(kept=False) == pytest.approx(storages, rel=0.05)
    assert blocks.peak() == pytest.approx(live.ledger.peak(since), rel=0.15)
    static = static_bytes(module, optimizer)
    assert static.parameters == static.gradients == static.optimizer == sum(p.nbytes for p in module.parameters())


def test_another_gradient_is_noticed_and_the_same_is_too(tmp_path: Path) -> None:
    step, _, _, watch = _stepped(tmp_path)
    step()
    plain = watch.told()
    for scale, wanted in ((1.0, "bits"), (1 + 1e-11, "rounding"), (1.1, "other")):
        step, module, optimizer, _ = _stepped(tmp_path / "unused")
        hooks = [p.register_hook(lambda gradient, scale=scale: gradient * scale) for p in module.parameters()]
        watch = GradientWatch(module, optimizer, tmp_path, write=False)
        step()
        assert sameness(watch.told(), plain) == wanted, hooks


@pytest.mark.parametrize("name", ["recompute", "accumulate", "save_on_cpu"])
def test_a_static_subject_takes_the_plain_step_on_a_small_batch(name: str, tmp_path: Path) -> None:
    workload, found = WORKLOADS["gpt12"], {}
    inputs, targets = torch.arange(32).reshape(4, 8), torch.arange(32).reshape(4, 8).flip(0)
    for subject in ("plain", name):
        torch.manual_seed(0)
        module = GPT(vocabulary=32, context=8, width=16, layers=2, heads=2).double()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        setting = Setting(subject, micro=3 if subject == "accumulate" else None)
        running = SUBJECTS[subject].prepare(Job(workload, module, optimizer, 4, setting, tmp_path))
        watch = GradientWatch(module, optimizer, tmp_path / "gradients", write=subject == "plain")
        running.step(inputs, targets)
        found[subject] = watch.told()
    assert sameness(found[name], found["plain"]) == ("rounding" if name == "accumulate" else "bits")


def _record(subject: str, **changes: Any) -> dict[str, Any]:
    record = {
        "subject": subject,
        "key": subject,
        "label": "-",
        "budget": None,
        "asked": "",
        "status": "ok",
        "detail": "",
        "minimum": None,
        "gradients": "a",
        "parameters": "p",
        "buffers": "b",
        "random": "r",
        "told": {},
        "difference": None,
        "sameness": "bits",
        "tensor_peak": 1000,
        "tensor_activations": 700,
        "allocator_peak": 1000,
        "rss_peak": 1100,
        "seconds": 1.0,
        "first": 1.5,
        "prepare": 0.1,
        "rate": 8.0,
    }
    return record | changes


def _told(*records: dict[str, Any], ablation: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    model = {
        "model": "resnet50",
        "batch": 8,
        "static": {"parameters": 100, "buffers": 0, "gradients": 100, "optimizer": 100},
        "activations": 700,
        "minimum": {"bytes": 350},
        "records": list(records),
        "ablation": ablation or [],
        "measured": "today",
    }
    return {"machine": {"cores": 2}, "models": {"resnet50": model}}


def _half(**changes: Any) -> dict[str, Any]:
    found = {
        "budget": 650,
        "asked": "50%",
        "tensor_peak": 640,
        "tensor_activations": 350,
        "allocator_peak": 640,
        "seconds": 1.1,
        "rate": 7.3,
    }
    return _record("narrowboat", **(found | changes))


def _failed(told: dict[str, Any]) -> list[str]:
    return [verdict["what"] for verdict in judge(told["models"]["resnet50"]) if not verdict["passed"]]


def test_every_promise_is_judged() -> None:
    static = _record("recompute", allocator_peak=650, seconds=1.3, rate=6.2)
    assert _failed(_told(_record("plain"), static, _half())) == []
    (found,) = _failed(_told(_record("plain"), static, _half(tensor_peak=651)))
    assert "within the budget" in found
    assert len(_failed(_told(_record("plain"), static, _half(sameness="other")))) == 3  # nor is anybody beaten
    assert len(_failed(_told(_record("plain"), static, _half(seconds=1.4, rate=5.7)))) == 3  # slower twice, over 1.15
    (found,) = _failed(_told(_record("plain"), static, _half(buffers="c")))
    assert "random state" in found
    assert len(judge(_told(_record("plain"), static)["models"]["resnet50"])) == 0


def test_twenty_fold_is_asked_only_of_large_batches() -> None:
    small = _half(tensor_activations=30)
    told = _told(_record("plain"), small)
    assert not any("20 x" in verdict["what"] for verdict in judge(told["models"]["resnet50"]))
    told["models"]["resnet50"]["batch"] = 128
    assert _failed(told) == []
    small["tensor_activations"] = 40
    assert any("20 x" in what for what in _failed(told))


def test_failures_and_refusals_are_written_and_never_count_as_points(tmp_path: Path) -> None:
    refused = _half(status="refused", minimum=777, rate=None, detail="BudgetError: too small")
    refused |= {"allocator_peak": None, "tensor_peak": None, "tensor_activations": None, "sameness": "unknown"}
    finder = _record("finder", budget=650, asked="50%", rate=None, status="error", detail="reached zero")
    ghost = _record("accumulate", label="micro-batch 2", sameness="other", difference=1.4, rate=9.0)
    told = _told(_record("plain"), finder, ghost, _half(), ablation=[_half(asked="all"), refused])
    page = tmp_path / "training.md"
    write_markdown(page, told)
    text = page.read_text()
    assert "reached zero" in text and "refused" in text and "777 B" in text
    assert "| 50% (650 B) | - | - | - | 7.30 |" in text  # plain does not fit, others' gradients do not count
    assert [point.subject for point in points(told["models"]["resnet50"]["records"])] == [
        "plain",
        "accumulate",
        "narrowboat",
    ]
    write_plot(tmp_path / "training.png", told)
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_a_setting_has_a_key_of_its_own() -> None:
    settings = [
        Setting("plain"),
        Setting("accumulate", micro=4),
        Setting("both", micro=4),
        Setting("compile", ratio=0.5),
        Setting("compile", ratio=0.25),
        Setting("narrowboat", budget=5),
        Setting("narrowboat", budget=5, techniques=()),
        Setting("narrowboat", budget=5, techniques=("recompute",)),
    ]
    assert len({setting.key for setting in settings}) == len(settings)
    assert not any("/" in setting.key or " " in setting.key for setting in settings)
