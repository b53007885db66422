"""The same records from live objects: a session, a plan, a profile, a training step."""

from __future__ import annotations

import dataclasses
from typing import Any

from narrowboat.errors import UsageError
from narrowboat.plan.result import Plan, summary
from narrowboat.report.records.model import BlockRow, PlanRecord, RunRecord, Told
from narrowboat.report.records.training import TrainPlanFacts, TrainRecord
from narrowboat.stream.session import Session


def of_session(session: Session) -> RunRecord:
    """What a session's passes took so far; times of its blocks are those of the last pass.

    Raises:
        UsageError: no pass has run yet.
    """
    from narrowboat.report.block_times import block_times

    stats = session.stats()
    if not stats["latency_ms"]:
        raise UsageError("there is nothing to draw: no pass has run yet")
    blocks = block_times(session) if not session.closed else []
    told = {**stats, "predicted_bytes_read": session.plan.timing.bytes_read, "blocks": blocks}
    return RunRecord.model_validate(told)


def of_plan(plan: Plan) -> PlanRecord:
    """A plan with its blocks."""
    rows = [
        BlockRow(
            name=block.name,
            bytes=block.nbytes,
            read_bytes=block.read_bytes,
            resident=number in plan.resident,
            predicted_stall_ms=plan.timing.stall_by_block.get(number, 0.0) * 1e3,
        )
        for number, block in enumerate(plan.blocks)
    ]
    return PlanRecord.model_validate({**summary(plan), "block_list": rows})


def of_dataclass(value: Any, model: type[Told]) -> Told:
    """What a ``RunReport``, ``MeasuredProfile`` or ``TrainReport`` says."""
    return model.model_validate(dataclasses.asdict(value))


def of_train_step(step: Any) -> TrainRecord:
    """What a ``TrainStep`` reports so far.

    Raises:
        UsageError: no step was made yet.
    """
    from narrowboat.report.trainee import plan_facts

    report = step.report()
    if not report.steps:
        raise UsageError("there is nothing to draw: no step was made yet")
    return of_train_report(report, TrainPlanFacts.model_validate(plan_facts(step.plan)))


def of_train_report(report: Any, plan: TrainPlanFacts | None = None) -> TrainRecord:
    """The same from its ``report()`` alone, and the plan if it is known."""
    rows = [dataclasses.asdict(row) for row in report.steps]
    if not rows:
        raise UsageError("there is nothing to draw: no step was made yet")
    last, told = rows[-1], report.as_dict()
    unknown = TrainPlanFacts(
        budget_bytes=last["budget"],
        min_budget_bytes=0,
        bottleneck="",
        bytes={},
        predicted_peak_bytes=last["predicted_peak"],
        plain_peak_bytes=0,
        predicted_slowdown=0.0,
    )
    return TrainRecord.model_validate(
        {**told, "budget_bytes": last["budget"], "plan": plan or unknown, "history": rows, "last_loss": last["loss"]}
    )
