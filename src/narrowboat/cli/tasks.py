"""``narrowboat tasks``: many models in one budget, with deadlines."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from narrowboat.cli.output import print_facts, print_json, print_table
from narrowboat.quantities import format_bytes, format_seconds, parse_seconds

app = typer.Typer(help="Many models in one budget, with deadlines that are kept.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(metavar="TASKS.yaml", help="The tasks; see docs/tasks.md.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Seconds = Annotated[str, typer.Option("--seconds", metavar="TIME", help="For how long, such as 60 or 10min.")]
TraceOut = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE.json", help="Write every job; ui.perfetto.dev opens it too.")
]


def _us(time: int | None) -> str:
    return "none" if time is None else format_seconds(time / 1e6)


def _seconds(text: str) -> float:
    return parse_seconds(float(text) if text.replace(".", "", 1).isdigit() else text, what="--seconds")


@app.command()
def check(file: File, json: Json = False) -> None:
    """Does it fit, will every deadline hold, and what would make it so.

    Exit code 0 if the set is admitted, 1 if it is refused.
    """
    from narrowboat.tasks.task_set import TaskSet
    from narrowboat.tasks.words import some_names

    task_set = TaskSet.load(file)
    verdict, profiles = task_set.admit(), task_set.profiles
    if json:
        print_json({**verdict.as_json(), "profiles": profiles})
    else:
        rows = [
            (
                task.name,
                "yes" if task.guaranteed and task.admitted else "NO" if task.guaranteed else "best effort",
                _us(task.bound) if task.guaranteed else "",
                _us(task.deadline),
                _us(task.cost),
                _us(task.longest),
                f"{task.utilisation:.1%}",
                str(task.blocks),
                format_bytes(task.pinned_bytes),
                format_bytes(task.running_bytes),
            )
            for task in verdict.tasks
        ]
        columns = [
            "task",
            "holds",
            "bound",
            "deadline",
            "cost",
            "longest part",
            "core",
            "blocks",
            "resident",
            "running",
        ]
        print_table(str(file), columns, rows, right=columns[2:])
        kept = f" while {some_names(verdict.memory.kept)} keep theirs" if verdict.memory.kept else ""
        facts = {
            "verdict": "admitted" if verdict.admitted else "refused",
            "memory": f"{format_bytes(verdict.needed_bytes)} of {format_bytes(verdict.budget)}, when "
            f"{verdict.memory.running} runs{kept}",
        }
        if verdict.tolerance is not None:
            facts["tolerates"] = f"{_us(verdict.tolerance)} of work more than assumed, in any busy stretch"
        if profiles:
            fewest = min(profile["n"] for profile in profiles.values())
            condition = next(iter(profiles.values()))["condition"]
            facts["measured"] = f"{fewest} passes of each network or more; {condition}"
        for place, reason in enumerate(verdict.reasons):
            facts["because" + " " * place] = reason
        for place, said in enumerate(verdict.suggestions):
            facts["would help" + " " * place] = said
        print_facts("", facts)
    if not verdict.admitted:
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of tasks.yaml, for editors."""
    from narrowboat.tasks.spec.schema import json_schema

    print_json(json_schema())


@app.command()
def simulate(file: File, seconds: Seconds = "10", trace: TraceOut = None, json: Json = False) -> None:
    """Run the tasks in simulated time, every job at its worst.

    Exit code 1 if a guaranteed deadline is missed.
    """
    from narrowboat.tasks.task_set import TaskSet

    task_set = TaskSet.load(file)
    record = task_set.simulate(_seconds(seconds))
    _report(record, trace, json, f"{file}, simulated")


@app.command()
def run(
    file: File,
    seconds: Seconds = "60",
    trace: TraceOut = None,
    force: Annotated[bool, typer.Option("--force", help="Run a set that is not admitted too, if it fits.")] = False,
    json: Json = False,
) -> None:
    """Run the tasks for real, in a process of their own, and write down every job.

    Signal HUP has the file read again: if admission allows it, the tasks and the budget change while they run.

    Exit code 1 if the set is refused or a guaranteed deadline is missed.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to change; PyTorch takes seconds to import
    from narrowboat.cli.tasks_live import follow, hangups, live_view
    from narrowboat.tasks.task_set import TaskSet

    task_set, length = TaskSet.load(file), _seconds(seconds)
    with (
        hangups() as asked,
        live_view(task_set, quiet=json) as on_tick,
        task_set.start(length, on_tick=on_tick, admitted_only=not force) as live,
    ):
        record = follow(live, file, asked)
    _report(record, trace, json, f"{file}, run")


@app.command()
def conform(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.json", help="Written by run or simulate.")],
    json: Json = False,
) -> None:
    """Check every premise of the analysis against what happened.

    Exit code 1 if one is broken: the guarantee is void then.
    """
    from narrowboat.tasks.conform import conform as check_record
    from narrowboat.tasks.record import Record

    told = check_record(Record.load(trace))
    if json:
        print_json(told.as_json())
    else:
        rows = [(p.name, "holds" if p.holds else "BROKEN", str(p.checked), p.said) for p in told.premises]
        print_table(str(trace), ["premise", "", "checked", ""], rows, right=["checked"])
        print_facts("", {"guarantee": told.wording})
    if not told.valid:
        raise typer.Exit(1)


@app.command()
def plot(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.json", help="Written by run or simulate.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="Where to draw it.")] = Path("tasks.png"),
    start: Annotated[str, typer.Option("--from", metavar="TIME", help="Where the Gantt chart begins.")] = "0s",
    span: Annotated[str, typer.Option("--for", metavar="TIME", help="How much of it to show.")] = "2s",
) -> None:
    """Draw the engines' Gantt chart, memory over time, and responses against bounds."""
    from narrowboat.report.tasks import draw_tasks
    from narrowboat.tasks.record import Record

    begin, length = parse_seconds(start, what="--from"), parse_seconds(span, what="--for")
    draw_tasks(Record.load(trace), out, begin, length)
    print_facts("", {"wrote": str(out)})


def _report(record: object, trace: Path | None, json: bool, title: str) -> None:
    from narrowboat.tasks.record import Record
    from narrowboat.tasks.summary import summarise

    assert isinstance(record, Record)
    told = summarise(record)
    if trace is not None:
        record.save(trace)
    if json:
        print_json(told.as_json())
    else:
        rows = [
            (
                t.name,
                str(t.jobs),
                str(t.late + t.unfinished),
                _us(t.median),
                _us(t.worst),
                _us(t.bound),
                _us(t.deadline),
                f"{t.worst / t.bound:.2f}" if t.bound and t.worst is not None else "",
                str(t.preemptions),
            )
            for t in told.tasks
        ]
        columns = ["task", "jobs", "missed", "median", "worst", "bound", "deadline", "worst/bound", "preempted"]
        print_table(title, columns, rows, right=columns[1:])
        facts = {
            "engines": f"computing {told.compute_share:.0%}, loading {told.load_share:.0%} of the time",
            "memory": f"{format_bytes(told.peak_bytes)} at most, of {format_bytes(told.budget_bytes)}",
        }
        if trace is not None:
            facts["wrote"] = str(trace)
        print_facts("", facts)
    if told.missed:
        raise typer.Exit(1)
