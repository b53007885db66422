"""Tasks that are changed while they run, and tasks whose inputs the program offers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from narrowboat import TaskSet
from narrowboat.errors import AdmissionError, BudgetError, ExecutorError, NarrowboatError, UsageError
from narrowboat.report.tasks import draw_tasks
from narrowboat.tasks.live import LiveRun
from narrowboat.tasks.record import BEYOND, Record
from narrowboat.tasks.summary import summarise
from narrowboat.tasks.transition import Transition, plan_change
from task_sets_kit import ANYWHERE, assert_premises

HEAD = "budget: {budget}\nmargin: 4\ncalibration: 200ms\ntasks:\n"
DEEP = '  - {name: deep, model: "tasks_test_nets:deep", weights: deep.safetensors, period: 500ms}\n'
OTHER = '  - {name: other, model: "tasks_test_nets:other", weights: other.safetensors, period: 250ms}\n'
QUEUED = (
    '  - {name: asked, model: "tasks_test_nets:other", weights: other.safetensors, input: {queue: q}, '
    "contract: {burst: 2, period: 400ms}}\n"
)


MOODY = DEEP.replace("deep", "moody")
Load = Callable[..., TaskSet]


def read(nets: Path, tasks: str, budget: str = "60MiB") -> TaskSet:
    path = nets / "live.yaml"
    path.write_text(HEAD.format(budget=budget) + tasks)
    return TaskSet.load(path)


@pytest.fixture(scope="module")
def load(nets: Path) -> Load:
    """Descriptions of tasks that have been measured once for all tests."""
    known = read(nets, DEEP + OTHER + QUEUED + MOODY)
    known.admit()
    return lambda tasks, budget="60MiB": known.with_settings(read(nets, tasks, budget).settings)


@pytest.fixture
def live(load: Load) -> Iterator[LiveRun]:
    with load(DEEP).start() as run:
        yield run


def ended(run: LiveRun) -> Record:
    run.stop()
    return run.wait(30)


def done(record: Record, task: str) -> list[int]:
    return [job.release for job in record.jobs if job.task == task and job.outcome in ("done", "late")]


def sound(record: Record) -> None:
    assert_premises(record, "a record of the jobs", *ANYWHERE)


def test_a_task_joins_and_another_goes_while_the_rest_run(live: LiveRun, load: Load, nets: Path) -> None:
    time.sleep(0.6)
    verdict = live.change(load(DEEP + OTHER))
    assert verdict.admitted and {task.name for task in verdict.tasks} == {"deep", "other"}
    time.sleep(1.2)
    live.change(load(OTHER))
    time.sleep(0.8)
    record = ended(live)
    sound(record)
    joined, left = record.changes[1], record.changes[2]
    assert [len(change.setup["tasks"]) for change in record.changes] == [2, 2, 1]
    assert min(done(record, "deep")) < record.changes[0].begin
    assert joined.begin <= min(j.release for j in record.jobs if j.task == "other" and j.number >= 2)
    assert max(job.release for job in record.jobs if job.task == "deep") <= left.begin
    # The one that stays keeps its pace through all of it.
    releases = [job.release for job in record.jobs if job.task == "deep"]
    assert releases == [500_000 * k for k in range(len(releases))]
    assert len(done(record, "other")) >= 4
    figures = {task.name: task for task in summarise(record).tasks}
    assert figures["deep"].jobs == len(releases) and figures["other"].done >= 4
    draw_tasks(record, nets / "live.png")
    assert (nets / "live.png").stat().st_size > 10_000
    again = Record.from_json(record.as_json())
    assert again.changes == record.changes and len(again.stretches()) == 4


def test_the_budget_changes_while_tasks_run_and_back(live: LiveRun) -> None:
    least = live.task_set.admit().needed_bytes
    for budget in ("40MiB", least + (1 << 20), "60MiB"):
        live.set_budget(budget)
        time.sleep(0.6)
    record = ended(live)
    sound(record)
    assert [change.setup["budget_bytes"] >> 20 for change in record.changes][0::2] == [40, 60]
    peaks = [stretch.premises["peak_bytes"] for stretch in record.stretches()]
    assert all(peak <= stretch.setup["budget_bytes"] for peak, stretch in zip(peaks, record.stretches(), strict=True))
    assert len(done(record, "deep")) >= 3


def test_what_is_refused_leaves_everything_as_it_was(live: LiveRun, load: Load, nets: Path) -> None:
    before = live.task_set
    for wrong, error, said in (
        (load(DEEP, "1MiB"), NarrowboatError, "memory"),
        (load(DEEP.replace("500ms", "1us")), AdmissionError, "overload|deadline"),
        (read(nets, DEEP + OTHER.replace("other.safe", "gone.safe")), NarrowboatError, "gone"),
        (load(DEEP, "900TiB"), AdmissionError, "in all"),
        (read(nets, "  - {name: w, period: 1s, blocks: [{load: 2ms, compute: 3ms}]}\n"), UsageError, "blocks"),
        ("tasks.yaml", UsageError, "TaskSet"),
    ):
        with pytest.raises(error, match=said):
            live.change(wrong)  # type: ignore[arg-type]
    for kept in (nets / "cache" / "tasks").iterdir():
        kept.rename(kept.with_suffix(".aside"))
    with pytest.raises(AdmissionError, match="narrowboat tasks check"):  # measuring would disturb those that run
        live.change(read(nets, DEEP + OTHER))
    for aside in (nets / "cache" / "tasks").glob("*.aside"):
        aside.rename(aside.with_suffix(".json"))
    time.sleep(0.6)
    assert live.task_set is before and live.running
    record = ended(live)
    sound(record)
    assert record.changes == []
    releases = [job.release for job in record.jobs]
    assert releases == [500_000 * k for k in range(len(releases))] and done(record, "deep")


def test_a_network_that_fails_while_it_warms_up_is_refused_and_taken_out_again(live: LiveRun, load: Load) -> None:
    failing = MOODY.replace("period: 500ms", 'period: 500ms, input: {generator: "tasks_test_nets:bad_inputs"}')
    with pytest.raises(ExecutorError, match=r"'moody' fails when it is tried"):
        live.change(load(DEEP + failing))
    time.sleep(0.6)
    record = ended(live)
    sound(record)
    assert len(record.changes) == 2 and record.changes[1].setup == record.setup
    assert max(done(record, "deep")) > record.changes[1].end


def test_offered_inputs_have_plain_pytorchs_bits_and_are_held_to_their_contract(nets: Path, load: Load) -> None:
    import tasks_test_nets  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    plain = tasks_test_nets.other()
    plain.load_state_dict(load_file(str(nets / "other.safetensors")), strict=False)  # and its padding
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 128, generator=generator) for _ in range(3)]
    with load(DEEP + QUEUED).start() as run:
        answers = []
        for x in inputs:
            answers.append(run.submit("asked", x).result(20))
            time.sleep(0.45)
        with pytest.raises(UsageError, match="queue"):
            run.submit("deep", inputs[0])
        with pytest.raises(UsageError, match="no task"):
            run.submit("nobody", inputs[0])
        wrong = run.submit("asked", torch.ones(1, 7)).result(20)
        time.sleep(0.9)  # its contract is two at once, and one more every 400 ms
        futures = [run.submit("asked", inputs[0]) for _ in range(5)]
        crowd = [future.result(20) for future in futures]
        record = ended(run)
        with pytest.raises(ExecutorError, match="ended"):
            run.submit("asked", inputs[0]).result(1)
    with torch.inference_mode():
        assert all(torch.equal(answer.output, plain(x)) for answer, x in zip(answers, inputs, strict=True))
    assert all(answer.response > 0 and answer.bound > 0 for answer in answers)  # type: ignore[operator]
    assert wrong.outcome == "failed" and "analysed for inputs [(1, 128) float32]" in wrong.cause
    # What comes beyond the contract is refused at the door, and voids nothing.
    assert [answer.outcome == "skipped" for answer in crowd] == [False, False, True, True, True]
    assert all(answer.cause.startswith(BEYOND) and "may come in" in answer.cause for answer in crowd[2:])
    sound(record)


def test_a_run_that_is_killed_answers_nobody_any_more(load: Load) -> None:
    with load(DEEP + QUEUED).start() as run:
        run._child.process.kill()
        with pytest.raises(ExecutorError, match="SIGKILL"):
            run.wait(20)
        with pytest.raises(ExecutorError, match="ended"):
            run.submit("asked", torch.ones(1, 128)).result(1)
        with pytest.raises((ExecutorError, BudgetError), match="ended"):
            run.set_budget("50MiB")


def test_a_change_that_is_overtaken_by_the_end_of_the_run_says_so(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(DEEP).start() as run:

        def slowly(now: TaskSet, new: TaskSet) -> Transition:
            planned = plan_change(now, new)
            run.stop()
            run.wait(30)
            return planned

        monkeypatch.setattr("narrowboat.tasks.live.plan_change", slowly)
        with pytest.raises(ExecutorError, match="ended"):
            run.set_budget("50MiB")
