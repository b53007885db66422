"""What the training benchmark must show, judged from its records. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from narrowboat.quantities import format_bytes
from training_kit.frontier import against_static, points
from training_kit.subjects import SUBJECTS

OURS = tuple(name for name, subject in SUBJECTS.items() if subject.ours)
STATIC = tuple(name for name, subject in SUBJECTS.items() if subject.static)
_HALF_AT_MOST = 1.15  # of the plain step's time, at half its activations
_FOLD, _FOLD_BATCH = 20, 128  # so many times less activation memory, at a batch of at least so many

Verdict = dict[str, Any]


def judge(model: dict[str, Any]) -> list[Verdict]:
    """Every verdict on one model's records; none where narrowboat was not measured."""
    ours = [record for record in model["records"] if record["subject"] in OURS and record["status"] == "ok"]
    about_ours = (_budgets, _gradients, _state, _half, _fold)
    verdicts = [verdict for about in about_ours for verdict in about(model, ours)]
    return verdicts + list(_static(model))


def _verdict(model: dict[str, Any], passed: bool, what: str, numbers: str) -> Verdict:
    return {"passed": passed, "where": model["model"], "what": what, "numbers": numbers}


def _budgets(model: dict[str, Any], ours: list[dict[str, Any]]) -> Iterator[Verdict]:
    for record in ours:
        peak = record["tensor_peak"]
        if peak is not None:
            yield _verdict(
                model,
                peak <= record["budget"],
                f"{_name(record)}: tensors stay within the budget",
                f"{format_bytes(peak)} of {format_bytes(record['budget'])}",
            )


def _gradients(model: dict[str, Any], ours: list[dict[str, Any]]) -> Iterator[Verdict]:
    for record in ours:
        difference = record["difference"]
        yield _verdict(
            model,
            record["sameness"] in ("bits", "rounding"),
            f"{_name(record)}: the plain step's gradients",
            record["sameness"] + (f", distance {difference:.0e}" if difference else ""),
        )


def _state(model: dict[str, Any], ours: list[dict[str, Any]]) -> Iterator[Verdict]:
    """A split batch draws and averages in another order; a whole one must leave no trace of how it was run."""
    plain = model["records"][0]
    for record in ours:
        if record["sameness"] == "bits":
            other = [name for name in ("buffers", "random") if record[name] != plain[name]]
            what = f"{_name(record)}: buffers and random state as after the plain step"
            yield _verdict(model, not other, what, ", ".join(other) + " differ" if other else "same bits")


def _static(model: dict[str, Any]) -> Iterator[Verdict]:
    for peak, words in (("allocator_peak", "allocator peak"), ("rss_peak", "resident peak")):
        ours = points((record for record in model["records"] if record["subject"] in OURS), peak)
        static = points((record for record in model["records"] if record["subject"] in STATIC), peak)
        for comparison in against_static(ours, static) if ours else []:
            beaten = comparison.static
            numbers = (
                "nothing of ours peaks as low" if comparison.ours is None else f"{comparison.ratio:.2f} of its rate"
            )
            what = f"not slower than {SUBJECTS[beaten.subject].label} ({beaten.label}) at its {words}"
            yield _verdict(model, comparison.passed, what, f"{numbers}, {format_bytes(beaten.peak)}")


def _half(model: dict[str, Any], ours: list[dict[str, Any]]) -> Iterator[Verdict]:
    plain = model["records"][0].get("seconds")
    half = model["activations"] / 2
    small = [r for r in ours if r["tensor_activations"] is not None and r["tensor_activations"] <= half]
    times = [record["seconds"] for record in small if record.get("seconds")]
    if plain and times:
        ratio = min(times) / plain
        yield _verdict(
            model, ratio <= _HALF_AT_MOST, "at most 1.15 x the time at half the activations", f"{ratio:.2f}"
        )


def _fold(model: dict[str, Any], ours: list[dict[str, Any]]) -> Iterator[Verdict]:
    found = [r for r in ours if r["tensor_activations"]]
    if model["batch"] < _FOLD_BATCH or not found:
        return
    best = min(found, key=lambda record: record["tensor_activations"])
    fold = model["activations"] / best["tensor_activations"]
    slower = best["seconds"] / model["records"][0]["seconds"] if best.get("seconds") else float("nan")
    numbers = f"{fold:.1f} x less, {slower:.2f} x the time"
    yield _verdict(model, fold >= _FOLD, f"{_FOLD} x less activation memory at batch {model['batch']}", numbers)


def _name(record: dict[str, Any]) -> str:
    return f"{SUBJECTS[record['subject']].label} at {record['asked']}"
