"""Plots take live objects and loaded ones alike, say what they lack, and survive any name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import narrowboat as nb
from narrowboat.errors import UsageError
from narrowboat.report import MemorySamples, load, plots
from narrowboat.report.picture import picture_bytes
from narrowboat.tasks.record import Record
from narrowboat.trace import Event, Trace
from report_kit import (
    bench_document,
    generate_document,
    plan_document,
    profile_document,
    rename_task,
    run_document,
    task_document,
    train_document,
    train_plan_document,
    write,
)

pytest.importorskip("matplotlib")
NASTY = ["<script>alert(1)</script>", "$\\frac{$", "_hidden", "日本語 \u202e", "a\nb\x00", "x" * 500, "", "$" * 3]
DOCUMENTS = {
    "run": run_document,
    "train": train_document,
    "train plan": train_plan_document,
    "plan": plan_document,
    "profile": profile_document,
    "bench": bench_document,
    "generate": generate_document,
    "tasks": task_document,
}
FITTING = [
    (plots.passes, "run"),
    (plots.passes, "generate"),
    (plots.blocks, "run"),
    (plots.blocks, "profile"),
    (plots.budget, "run"),
    (plots.budget, "plan"),
    (plots.budget, "train"),
    (plots.budget, "train plan"),
    (plots.memory, "run"),
    (plots.memory, "tasks"),
    (plots.latency_curve, "plan"),
    (plots.latency_curve, "profile"),
    (plots.latency_curve, "bench"),
    (plots.train_curve, "train plan"),
    (plots.throughput_curve, "train plan"),
    (plots.train_steps, "train"),
    (plots.gantt, "tasks"),
    (plots.responses, "tasks"),
    (plots.tasks, "tasks"),
]


def is_png(figure: Any) -> bool:
    return picture_bytes(figure, "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(("plot", "kind"), FITTING, ids=lambda value: getattr(value, "__name__", value))
def test_a_file_is_drawn_with_units_at_its_axes(plot: Any, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, "r.json", DOCUMENTS[kind]())
    figure = plot(path, title="a title")
    assert is_png(figure)
    axes = [each for each in figure.get_axes() if each.axison]
    assert all(each.get_xlabel() for each in axes[-1:])
    assert is_png(plot(load(path), width=4.2))


@pytest.mark.parametrize("plot", [getattr(plots, name) for name in plots.__all__], ids=plots.__all__)
def test_what_a_plot_cannot_draw_is_said(plot: Any) -> None:
    with pytest.raises(UsageError, match=r"this is a int|and is a int"):
        plot(3)


def test_a_live_session_is_drawn_and_its_memory_follows_the_budget(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).eval()

    save_file(factory().state_dict(), tmp_path / "w.safetensors")
    x = torch.zeros(1, 256)
    model = nb.stream(factory, tmp_path / "w.safetensors", budget="32MiB", example=(x,))
    with nb.session(model) as session:
        with pytest.raises(UsageError, match="no pass has run"):
            plots.passes(session)
        with MemorySamples(session) as samples, torch.inference_mode():
            for _ in range(3):
                model(x)
            session.budget = "30MiB"
            model(x)
        assert samples.budgets[0][1] == 32 << 20
        assert len(samples.points) >= 2
        for plot in (plots.passes, plots.blocks, plots.budget, plots.timeline):
            assert is_png(plot(session))
        assert is_png(plots.budget(session.plan))
        assert is_png(plots.memory(samples))


def test_a_live_training_step_is_drawn() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with nb.train_step(
        model, nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), budget="200MiB"
    ) as step:
        with pytest.raises(UsageError, match="no step was made yet"):
            plots.train_steps(step)
        step(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))
        assert is_png(plots.train_steps(step))
        assert is_png(plots.train_steps(step.report()))
        assert is_png(plots.budget(step.plan))


def test_a_figure_shows_itself_in_a_notebook(tmp_path: Path) -> None:
    figure = plots.passes(write(tmp_path, "r.json", run_document()))
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    block = run_document()["blocks"][0]
    told = run_document(blocks=[{**block, "name": name} for name in NASTY], fixed_parts=dict.fromkeys(NASTY, 1 << 20))
    path = write(tmp_path, "r.json", told)
    assert is_png(plots.blocks(path, title=" ".join(NASTY)))
    assert is_png(plots.budget(path))
    trace = Trace()
    for number, name in enumerate(NASTY):
        trace.add(Event("compute", name, float(number), number + 1.0))
    assert is_png(plots.timeline(trace))


@pytest.mark.parametrize("name", NASTY[:3])
def test_any_task_can_be_drawn(name: str) -> None:
    record = Record.from_json(rename_task(task_document(0.5), "words", name))
    assert is_png(plots.tasks(record, span=0.5))


def test_many_blocks_are_taken_together_by_module(tmp_path: Path) -> None:
    row = run_document()["blocks"][0]
    rows = [{**row, "name": f"layer{k % 4}.{k}.conv"} for k in range(200)]
    figure = plots.blocks(write(tmp_path, "r.json", run_document(blocks=rows)))
    names = [label.get_text().split(" ")[0] for label in figure.get_axes()[0].get_yticklabels()]
    assert names == ["layer0", "layer1", "layer2", "layer3"]


def test_settings_of_the_program_are_left_as_they_were(tmp_path: Path) -> None:
    from matplotlib import rcParams

    before = dict(rcParams)
    plots.passes(write(tmp_path, "r.json", run_document()))
    assert dict(rcParams) == before
