"""``narrowboat demo``: a real network and a large one, each in a fraction of its bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.panel import Panel

from narrowboat.cli.output import console, error_console, make_table, print_json, progress_bar
from narrowboat.quantities import format_bytes, format_seconds

if TYPE_CHECKING:
    from narrowboat.demo.child import Outcome
    from narrowboat.demo.photos import PhotosReport
    from narrowboat.demo.vision import Comparison

_BUSY = 0.75
"""Processes per core before the demo's own children run, above which times are marked as doubtful."""


def demo(
    folder: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Work folder for the weights (1.3 GB) and the picture; used again.")
    ] = Path("narrowboat-demo"),
    photos_only: Annotated[bool, typer.Option("--photos-only", help="Leave out the large model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a real network on real photographs with two fifths of its weights in memory, and a 1.2 GB vision transformer
    at a fifth of its bytes beside plain PyTorch, mmap and accelerate. About two minutes.

    Exit code 1 if any output is not plain PyTorch's, bit by bit.
    """
    begun = time.perf_counter()
    from narrowboat.demo.files import packed_weights, work_folder
    from narrowboat.demo.photos import classify_photos

    place = work_folder(folder)
    # What narrowboat runs on is imported; from here on each half says what it does.
    _say(json, "[bold]1. A real network on real photographs[/], with 40 % of its weights in memory")
    weights = _with_bars(lambda bar: packed_weights("efficientnet_lite2", place, bar))
    with progress_bar("looking at photographs", unit="steps") as progress:
        photos = classify_photos(weights, place, progress)
    if not json:
        _show_photos(photos)
    comparison = None
    if not photos_only:
        from narrowboat.demo.vision import compare

        _say(json, "[bold]2. A vision transformer of 1.2 GB[/], at a fifth of its bytes, beside what people use today")
        weights = _with_bars(lambda bar: packed_weights("vit_large", place, bar))
        comparison = compare(weights, place, _announce)
        if not json:
            _show_comparison(comparison)
    exact = all(not photo.difference for photo in photos.photos) and (
        comparison is None or comparison.exact("narrowboat") is not False
    )
    if json:
        print_json(
            {"photos": photos, "comparison": comparison, "exact": exact, "seconds": time.perf_counter() - begun}
        )
    else:
        _show_summary(photos, comparison, place, time.perf_counter() - begun)
    if not exact:
        raise typer.Exit(1)


def _say(json: bool, text: str) -> None:
    screen = error_console() if json else console()
    screen.print(f"\n{text}", highlight=False)


def _with_bars(make: Callable[[Callable[[str], Callable[[int, int], None]]], Path]) -> Path:
    """Run ``make`` with a progress bar for each of its steps."""
    from contextlib import ExitStack

    with ExitStack() as bars:

        def begin(what: str) -> Callable[[int, int], None]:
            bars.close()
            return bars.enter_context(progress_bar(what))

        return make(begin)


def _announce(subject: str) -> Callable[[int, float], None]:
    """Say on stderr which child is running, and each of its passes."""
    from narrowboat.demo.vision import TITLES

    screen = error_console()
    screen.print(f"  [dim]{escape(TITLES[subject])}:[/] ", end="", highlight=False)
    passes: list[float] = []

    def on_pass(number: int, milliseconds: float) -> None:
        passes.append(milliseconds)
        screen.print(f"[dim]{format_seconds(milliseconds / 1e3)}[/] ", end="", highlight=False)

    return on_pass


def _show_photos(report: PhotosReport) -> None:
    columns = [photo.name for photo in report.photos]
    rows = []
    for place in range(len(report.photos[0].top)):
        answers = [photo.top[place] for photo in report.photos]
        rows.append([f"{chance:4.0%}  {name}" for name, chance in answers])
    rows.append([""] * len(columns))
    rows.append([format_seconds(photo.latency_ms / 1e3) for photo in report.photos])
    rows.append([f"NOT the same: {p.difference}" if p.difference else "same bits as PyTorch" for p in report.photos])
    console().print(make_table("EfficientNet-Lite2: the five likeliest classes", columns, rows))
    besides = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in report.fixed_parts.items() if nbytes)
    lines = [
        f"{format_bytes(report.held_bytes)} of {format_bytes(report.weight_bytes)} of weights held "
        f"({report.share:.0%}); {format_bytes(report.budget_bytes)} in all, with {besides}.",
        f"Peak {format_bytes(report.peak_bytes)} over the process baseline, of {format_bytes(report.budget_bytes)}; "
        f"the smallest budget for this network is {format_bytes(report.min_budget_bytes)}.",
    ]
    if report.raised:
        lines.append(
            "Its activations need more than 40 % of the weights would leave: this is the smallest budget there is."
        )
    lines.append("(ImageNet has no class for astronauts; the network says what it sees of one.)")
    console().print("\n".join(lines), highlight=False)


def _show_comparison(report: Comparison) -> None:
    from narrowboat.demo.vision import TITLES

    error_console().print()
    rows = []
    for subject, outcome in report.outcomes.items():
        exact = report.exact(subject)
        rows.append(
            [
                TITLES[subject],
                _milliseconds(outcome.first_answer_ms),
                _per_pass(outcome),
                "" if outcome.peak_bytes is None else f"{outcome.peak_bytes / (1 << 20):,.0f}",
                "?" if outcome.steady_read is None else f"{outcome.steady_read / (1 << 20):,.0f}",
                {None: "no answer" if outcome.failure else "stopped", True: "yes", False: "NO"}[exact],
            ]
        )
    numbers = ["first answer ms", "median pass ms", "peak MiB over baseline", "MiB read per pass"]
    title = f"ViT-L, {format_bytes(report.weight_bytes)} of weights; the budget is {format_bytes(report.budget)}"
    console().print(make_table(title, ["", *numbers, "exact"], rows, right=numbers))
    for line in _notes(report):
        console().print(line, highlight=False, markup=False)


def _notes(report: Comparison) -> list[str]:
    from narrowboat.demo.vision import TITLES

    if report.unlimited is None:
        lines = [
            f"The last three ran under a memory cgroup: {format_bytes(report.budget)} over each one's own baseline, "
            f"and {format_bytes(report.slack)} of slack. All started with the weights out of the page cache."
        ]
    else:
        lines = [
            f"No memory limit could be enforced here ({report.unlimited}): "
            "mmap and accelerate had the whole page cache."
        ]
    for subject, outcome in report.outcomes.items():
        if outcome.failure:
            lines.append(f"{TITLES[subject]}: {outcome.failure}.")
        elif outcome.stopped_after is not None:
            done = len(outcome.latency_ms)
            lines.append(f"{TITLES[subject]}: stopped after {outcome.stopped_after:.0f} s with {done} passes done.")
    if report.load > _BUSY:
        lines.append(
            f"This machine was busy with other work ({report.load:.1f} processes per core): times say little."
        )
    lines.append(
        f"Timeline: {report.timeline}" if report.timeline is not None else f"No timeline: {report.no_timeline}"
    )
    return lines


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _per_pass(outcome: Outcome) -> str:
    unfinished = outcome.unfinished_ms
    if unfinished is not None and unfinished > (outcome.steady_ms or 0.0):
        return f"> {unfinished:,.0f}"
    return _milliseconds(outcome.steady_ms)


def _show_summary(photos: PhotosReport, comparison: Comparison | None, folder: Path, seconds: float) -> None:
    same = all(not photo.difference for photo in photos.photos)
    lines = [
        f"A real network named what is on three photographs while holding {photos.share:.0%} of its weights, "
        + ("and every bit of its answers is plain PyTorch's." if same else "but its answers are NOT plain PyTorch's.")
    ]
    if comparison is not None:
        ours, plain = comparison.outcomes["narrowboat"], comparison.outcomes["plain"]
        if ours.steady_ms and plain.steady_ms and ours.peak_bytes and plain.peak_bytes:
            answer = {True: "the same bits", False: "NOT the same bits", None: "not compared"}
            lines.append(
                f"A 1.2 GB vision transformer ran in {format_bytes(ours.peak_bytes)} instead of "
                f"{format_bytes(plain.peak_bytes)}, at {ours.steady_ms / plain.steady_ms:.2f} times the latency of "
                f"having it all in memory: {answer[comparison.exact('narrowboat')]}."
            )
        lines += _beside(comparison, ours)
    lines += [
        "",
        f"It took {seconds:.0f} s. The weights stay in {folder} for the next time; delete it when you are done.",
        "Your own model:  narrowboat run package.module:factory --weights FILE --budget 300MiB --verify",
    ]
    console().print(
        Panel("\n".join(escape(line) for line in lines), title="narrowboat", title_align="left", padding=(1, 2))
    )


def _beside(comparison: Comparison, ours: Outcome) -> list[str]:
    """How many times slower the others were under the same limit."""
    words = []
    for subject, name in (("mmap", "safetensors mmap"), ("accelerate", "accelerate")):
        other = comparison.outcomes[subject]
        slowest = max(filter(None, (other.steady_ms, other.unfinished_ms)), default=None)
        if slowest is None or not ours.steady_ms:
            continue
        cut = other.unfinished_ms is not None and other.unfinished_ms >= slowest
        words.append(f"{name} took {'more than ' if cut else ''}{slowest / ours.steady_ms:.1f} times as long")
    limit = "Under the same limit" if comparison.unlimited is None else "Without any limit on the page cache"
    return [f"{limit}, {' and '.join(words)} per pass."] if words else []
