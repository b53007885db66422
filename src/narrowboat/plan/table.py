"""The lookup table: plans made in advance, so that a change of budget is a look and not a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from narrowboat.plan.curve import front
from narrowboat.plan.make import retime
from narrowboat.plan.model import PAGE, Machine, Workload
from narrowboat.plan.result import Plan
from narrowboat.plan.timing import Timing


@dataclass(frozen=True, slots=True)
class TableRow:
    """One plan of the front.

    Attributes:
        policy: the allocator policy it counts on.
        plan: the decisions.
    """

    policy: str
    plan: Plan


class PlanTable:
    """Plans by budget: the Pareto front, smallest budget first.

    Args:
        rows: any plans of one workload; those that a smaller budget equals are left out.
        workloads, machine: by what to time a plan that is looked up, where the rows' own prediction is an earlier one.
    """

    def __init__(
        self, rows: Sequence[TableRow], workloads: dict[str, Workload] | None = None, machine: Machine | None = None
    ) -> None:
        self._workloads, self._machine = workloads or {}, machine
        by_plan = {id(row.plan): row for row in rows}
        self.rows = [by_plan[id(plan)] for plan in front(row.plan for row in rows)]

    @property
    def plans(self) -> list[Plan]:
        """The front, without the policies."""
        return [row.plan for row in self.rows]

    def best(self, budget: int) -> TableRow | None:
        """The fastest plan that ``budget`` bytes hold, as a plan for that budget; None below the first."""
        found = [row for row in self.rows if row.plan.budget <= budget]
        if not found:
            return None
        policy, plan = found[-1].policy, replace(found[-1].plan, budget=budget)
        if self._machine is not None:
            plan = retime(plan, self._workloads[policy], self._machine, lower_bound=plan.lower_bound)
        return TableRow(policy, plan)

    def to_json(self) -> list[dict[str, Any]]:
        """The decisions; ``from_json`` makes the plans from them again."""
        return [
            {
                "policy": row.policy,
                "budget": row.plan.budget,
                "latency_ms": row.plan.predicted_latency * 1e3,
                "bytes_read": row.plan.timing.bytes_read,
                "bytes_copied": row.plan.timing.bytes_copied,
                "lower_bound_ms": row.plan.lower_bound * 1e3,
                "fixed_bytes": row.plan.fixed_bytes,
                "resident": sorted(row.plan.resident),
                "streamed": list(row.plan.streamed),
                "offsets": list(row.plan.offsets),
                "resident_bytes": row.plan.resident_bytes,
                "window_bytes": row.plan.window_bytes,
                "cached": sorted(row.plan.cached),
                "host_room": _host_room(row.plan.machine),
            }
            for row in self.rows
        ]

    @classmethod
    def from_json(
        cls, rows: Sequence[dict[str, Any]], workloads: dict[str, Workload], machine: Machine, least: tuple[int, str]
    ) -> PlanTable:
        """The table again, its plans timed for this machine as they are looked up.

        A row counts from the budget that it needs now; one that no longer fits the workload is left out, and so is one
        made for another host cache, which another plan may serve better (rows kept before there was a device stage are
        rows without one).

        Args:
            rows: of ``to_json``.
            workloads: what passes need under each allocator policy.
            machine: the storage, and the way to the device.
            least: the smallest budget and what sets it.

        Raises:
            KeyError, TypeError, ValueError: these are no such rows.
        """
        made = []
        for row in rows:
            workload = workloads.get(row["policy"])
            numbers = {*row["resident"], *row["streamed"]}
            if workload is None or numbers != set(range(len(workload.blocks))):
                continue
            if any(offset % PAGE for offset in row["offsets"]) or row.get("host_room") != _host_room(machine):
                continue
            cached = frozenset(row.get("cached", ()))
            if not cached <= {*row["streamed"]} or sum(workload.blocks[i].nbytes for i in cached) > machine.host_room:
                continue
            plan = Plan(
                # What is reserved beside the weights may have changed since.
                budget=int(row["resident_bytes"]) + int(row["window_bytes"]) + workload.fixed_bytes,
                minimum=least[0],
                limiter=least[1],
                fixed_bytes=workload.fixed_bytes,
                fixed_parts=workload.fixed_parts,
                blocks=workload.blocks,
                resident=frozenset(row["resident"]),
                streamed=tuple(row["streamed"]),
                offsets=tuple(row["offsets"]),
                resident_bytes=int(row["resident_bytes"]),
                window_bytes=int(row["window_bytes"]),
                timing=Timing(
                    float(row["latency_ms"]) / 1e3,
                    0.0,
                    {},
                    int(row["bytes_read"]),
                    0.0,
                    bytes_copied=int(row.get("bytes_copied", 0)),
                ),
                machine=machine,
                lower_bound=float(row["lower_bound_ms"]) / 1e3,
                cached=cached,
            )
            made.append(TableRow(row["policy"], plan))
        return cls(made, workloads, machine)


def _host_room(machine: Machine) -> int | None:
    """Bytes for copies of weights in host memory; None without a device stage."""
    return machine.host_room if machine.copy_bandwidth else None
