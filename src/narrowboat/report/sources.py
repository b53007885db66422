"""What a plot was given, as the record that it draws: a live object, something loaded, or the name of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from narrowboat.errors import UsageError
from narrowboat.report.records.find import Loaded, load
from narrowboat.report.records.model import GenerateRecord, ProfileRecord, RunRecord, Told
from narrowboat.report.records.training import TrainRecord
from narrowboat.tasks.record import Record
from narrowboat.trace import Trace


def is_a(source: Any, name: str) -> bool:
    """Whether its class is ``package.module:Class`` of narrowboat's; imports nothing, for what is not imported."""
    module, _, kind = name.partition(":")
    return any(c.__module__ == f"narrowboat.{module}" and c.__qualname__ == kind for c in type(source).__mro__)


def record_of(source: Any) -> Any:
    """A record of ``source``; what is none already, and no live object that has one, comes back as it is.

    Raises:
        UsageError: a file that cannot be read, or an object of which nothing has been measured yet.
    """
    if isinstance(source, (str, Path)):
        source = load(source)
    if isinstance(source, Loaded):
        return source.value
    if isinstance(source, (Told, Record, Trace)):
        return source
    if is_a(source, "plan.result:Plan"):
        from narrowboat.report.records.live import of_plan

        return of_plan(source)
    if is_a(source, "report.foresee:Forecast"):
        return record_of(source.plan)
    if is_a(source, "train.step:TrainStep"):
        from narrowboat.report.records.live import of_train_step

        return of_train_step(source)
    if is_a(source, "train.report:Report"):
        from narrowboat.report.records.live import of_train_report

        return of_train_report(source)
    if is_a(source, "stream.session:Session"):
        from narrowboat.report.records.live import of_session

        return of_session(source)
    for name, model in (
        ("report.run:RunReport", RunRecord),
        ("profile.measured:MeasuredProfile", ProfileRecord),
        ("report.train:TrainReport", TrainRecord),
        ("report.generate:GenerateReport", GenerateRecord),
    ):
        if is_a(source, name):
            from narrowboat.report.records.live import of_dataclass

            return of_dataclass(source, model)
    return source


def need(source: Any, *kinds: type, what: str) -> Any:
    """The record of ``source`` if it is one of these.

    Args:
        source: what the caller was given.
        kinds: of records.
        what: the plot, and what it is of, for the message.

    Raises:
        UsageError: it is something else.
    """
    found = record_of(source)
    if not isinstance(found, kinds):
        raise UsageError(f"{what}; this is a {type(source).__name__}")
    return found
