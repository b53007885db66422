"""How one training step fits into its bytes: micro-batches and recomputation chosen together, by predicted time.

SAGE (Gim and Ko, MobiSys 2022) first makes micro-batches smaller, down to where throughput falls, and then recomputes.
Here every number of micro-batches is planned with the fastest schedule that its bytes allow, and the fastest of all
is taken: that gives SAGE's order where small micro-batches cost nothing, and recomputation first where they do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from narrowboat.errors import BudgetError
from narrowboat.plan.recompute import Kept, Schedule, Segment, Table, evaluate, solve
from narrowboat.quantities import format_apart, format_bytes
from narrowboat.train.heap_guard import usable
from narrowboat.train.measure.chain import Rates, TrainingChain, build_chain
from narrowboat.train.measure.simulate import Foreseen, foresee
from narrowboat.train.measure.study import Study
from narrowboat.train.premises import Premises
from narrowboat.train.static import StaticBytes
from narrowboat.train.tape.frames import StepPlan, compile_plan
from narrowboat.train.tiers import Tier

MARGIN_SHARE = 0.04  # of activations: what the operators' kernels take inside
MARGIN_LEAST = 1 << 20
_ROOMS = (1.3, 1.2, 1.15, 1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # times the room, largest first
_ANEW = 3e-10  # seconds per byte that the system hands out once more: cleared, in pages of 4 KiB and of 2 MiB
_KEPT_BY_HEAP = 1.6  # resident memory over live tensors with glibc's own policy, on convolutional networks


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """One step's plan.

    Attributes:
        budget: bytes, everything included.
        parts: micro-batches.
        micro_batch: samples in each (the last may have fewer).
        static: bytes held beside activations at the worst moment, by class.
        tier: where gradients and optimizer state are.
        activations: predicted bytes at the worst moment beyond those, with its margin.
        predicted_peak: bytes in all.
        predicted_seconds: of forward and backward of the whole batch.
        plain_seconds: the same of the plain step.
        plain_peak: bytes that the plain step takes in all.
        min_budget: the smallest budget with a plan.
        bottleneck: the part of the model that sets it.
        schedule: which units are kept, reduced, recomputed, spilled, in words.
        refused: what was not used, and why.
        spilled: bytes written to storage per step.
        offloaded: bytes copied from a device to pinned host memory per step.
        at_once: bytes of activations that are spilled at one time.
        step: for the tape; None where the plain step fits, with all that the heap keeps of what it frees.
        foreseen: the operator-level count of ``step``.
    """

    budget: int
    parts: int
    micro_batch: int
    static: StaticBytes
    tier: Tier
    activations: int
    predicted_peak: int
    predicted_seconds: float
    plain_seconds: float
    plain_peak: int
    min_budget: int
    bottleneck: str
    schedule: str
    refused: tuple[str, ...]
    spilled: int
    step: StepPlan | None
    foreseen: Foreseen | None
    offloaded: int = 0
    at_once: int = 0

    def for_samples(self, samples: int) -> TrainPlan:
        """The same plan for a batch of fewer samples (the ragged last one): fewer or smaller micro-batches."""
        return replace(self, parts=-(-samples // self.micro_batch))

    @property
    def predicted_slowdown(self) -> float:
        """Predicted time over the plain step's."""
        return self.predicted_seconds / self.plain_seconds if self.plain_seconds else 1.0

    def as_dict(self) -> dict[str, Any]:
        """For reports and JSON."""
        return {
            "budget_bytes": self.budget,
            "min_budget_bytes": self.min_budget,
            "bottleneck": self.bottleneck,
            "bytes": {**self.static.as_dict(), "activations": self.activations},
            "predicted_peak_bytes": self.predicted_peak,
            "plain_peak_bytes": self.plain_peak,
            "predicted_slowdown": round(self.predicted_slowdown, 3),
            "tier": self.tier.name,
            "micro_batches": self.parts,
            "micro_batch": self.micro_batch,
            "schedule": self.schedule,
            "spilled_bytes": self.spilled,
            "offloaded_bytes": self.offloaded,
            "refused": list(self.refused),
        }

    def __str__(self) -> str:
        classes = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.static.as_dict().items() if size)
        lines = [
            f"budget {format_bytes(self.budget)} (smallest {format_bytes(self.min_budget)}, set by {self.bottleneck})",
            f"predicted peak {format_bytes(self.predicted_peak)}: {classes}, "
            f"activations {format_bytes(self.activations)}; the plain step takes {format_bytes(self.plain_peak)}",
            f"{self.parts} micro-batch{'es' if self.parts > 1 else ''} of {self.micro_batch}, "
            f"predicted {self.predicted_slowdown:.2f} times the plain step's time",
            f"units: {self.schedule}",
        ]
        if self.tier.name != "memory":
            what = "optimizer state" if self.tier.name == "state" else "optimizer state and gradients"
            lines.append(f"{what} on storage, stepped bucket by bucket")
        if self.tier.window:
            lines.append(f"weights on storage, taking turns in {format_bytes(self.tier.window)}")
        if self.offloaded:
            lines.append(f"{format_bytes(self.offloaded)} to pinned host memory in each step")
        if self.spilled:
            lines.append(f"{format_bytes(self.spilled)} to storage in each step")
        lines += [f"not used: {reason}" for reason in self.refused]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Way:
    """One thing to try: so many micro-batches, with activations on a level of ``Rates`` ("": nowhere), on one tier."""

    parts: int
    size: int
    spill: str
    tier: Tier


class Planner:
    """Plans for one study; what it works out for one budget serves the next."""

    def __init__(self, study: Study, premises: Premises) -> None:
        self._study = study
        self.premises = premises
        self._chains: dict[tuple[int, str, int, bool, bool], TrainingChain] = {}
        self._least: tuple[int, str] | None = None
        self._smallest: list[tuple[_Way, Schedule]] = []  # those that set it
        self._plain: tuple[float, int] | None = None

    @property
    def batch(self) -> int:
        """Samples in the largest batch that it plans for."""
        return self._study.batch

    def forget(self, unsafe: frozenset[int]) -> None:
        """Plan anew without replaying these storages."""
        self.plan_from(replace(self.premises, unsafe=self.premises.unsafe | unsafe))

    def keep_whole(self, reason: str) -> None:
        """Do not split such batches any more."""
        self.premises = replace(self.premises, splittable=reason)
        self._least = None

    def without_storage(self, reason: str) -> None:
        """Put no activations on storage any more."""
        rates = replace(self.premises.rates, write=None, read=None)
        self.plan_from(replace(self.premises, rates=rates, no_storage=reason))

    def without_host(self, reason: str) -> None:
        """Put no activations into pinned host memory any more, which is the only way to storage too."""
        self.plan_from(replace(self.premises, rates=Rates(), no_host=reason, no_storage=reason))

    def plan_from(self, premises: Premises) -> None:
        """Plan from other premises from now on."""
        self.premises = premises
        self._count_anew()

    def reserve(self, slack: int) -> None:
        """Keep so many more bytes free of tensors."""
        self.premises = replace(self.premises, slack=self.premises.slack + slack)
        self._least = None

    def replay_of_everything(self) -> StepPlan | None:
        """For a check: what replays all that any plan may replay; None where nothing may be."""
        techniques = self.premises.techniques
        made = self.chain(self._study.batch)
        last = len(made.options) - 1
        if last < 1 or not (techniques.recompute or techniques.reduce):
            return None
        step = math.isqrt(last - 1) + 1
        ends = [(start, min(start + step, last)) for start in range(0, last, step)]
        segments = (Segment(start, end, tuple(Kept(unit) for unit in range(start, end))) for start, end in ends)
        return compile_plan(made.tape, made.cuts, made.options, [*segments, Kept(last)])

    def chain(
        self, size: int, *, spill: str = "", room: int = 0, together: bool = False, growing: bool = False
    ) -> TrainingChain:
        """The chain of a micro-batch of ``size`` samples.

        Args:
            size: samples.
            spill: to which level of ``Rates``; "" for none.
            room: bytes of pinned host memory for it.
            together: of one that meets the others in lockstep.
            growing: with the gradients of parameters, which come one by one in the backward pass.
        """
        key = (size, spill, room, together, growing)
        if key not in self._chains:
            premises = self.premises
            study = premises.joint if together and premises.joint is not None else self._study
            tape = study.tape(size)
            self._chains[key] = build_chain(
                tape.with_gradients() if growing else tape,
                replace(premises.techniques, spill=bool(spill)),
                premises.rates.at(spill, tape.saved_bytes, room),
                unsafe=premises.unsafe,
            )
        return self._chains[key]

    def _chain_of(self, way: _Way) -> TrainingChain:
        room = self._share(way, self.premises.rates.host_room) if way.spill else 0
        return self.chain(way.size, spill=way.spill, room=room, together=self._together(way), growing=_growing(way))

    def _ways(self) -> list[_Way]:
        levels = ("", *(self.premises.rates.levels if self.premises.techniques.spill else ()))
        return [
            _Way(parts, -(-self._study.batch // parts), spill, tier)
            for tier in self.premises.tiers
            for parts in self._parts()
            for spill in levels
        ]

    def _parts(self) -> list[int]:
        premises = self.premises
        if premises.parts is not None:
            return [max(1, min(premises.parts, self._study.batch))]
        if premises.splittable or not premises.accumulate:
            return [1]
        sizes, size = [], self._study.batch
        while size > 0:
            sizes.append(size)
            size //= 2
        return list(dict.fromkeys(-(-self._study.batch // size) for size in sizes)) or [1]

    def plain(self) -> tuple[float, int]:
        """Seconds and activation bytes of the plain step."""
        if self._plain is None:
            way = self._plain_way()
            chain = self._chain_of(way).chain
            items = tuple(Kept(unit) for unit in range(len(chain.units)))
            seconds, bound = evaluate(chain, items)
            self._plain = seconds, self._counted(way, Schedule(seconds, bound, items))[1].peak
        return self._plain

    def _plain_way(self) -> _Way:
        return _Way(1, self._study.batch, "", self.premises.tiers[0])

    def minimum(self) -> tuple[int, str]:
        """The smallest budget with a plan, and what sets it."""
        if self._least is None:
            ways = self._ways()
            # Fewer samples never need more, but for the second copy of a gradient that accumulation takes.
            ends = {way.parts for way in (ways[0], ways[-1])}
            found = []
            self._smallest = []
            for way in ways:
                if way.parts in ends and way.tier is self._leanest():
                    table = self._solve(way, 0)
                    schedule = table.best(table.minimum)
                    needed = self._count(way, schedule, self._counted(way, schedule)[1])
                    found.append((self._total(needed, way), table.bottleneck))
                    self._smallest.append((way, schedule))
            if self.premises.parts in (None, 1) and not self._leanest().window:
                # The chain rounds up, and keeping everything may be the least there is in small networks.
                way = replace(self._plain_way(), tier=self._leanest())
                found.append((self._total(max(self.plain()[1], _afterwards(way)), way), found[0][1]))
            least, unit = min(found)
            static = self._leanest().static
            name, size = max(static.as_dict().items(), key=lambda item: item[1])
            if static.total > 2 * (least - static.total):
                unit = f"what is there whatever the plan ({name}: {format_bytes(size)})"
            self._least = (least, unit)
        return self._least

    def _leanest(self) -> Tier:
        return min(self.premises.tiers, key=lambda tier: tier.static.total)

    def _solve(self, way: _Way, room: int) -> Table:
        chain = self._chain_of(way).chain
        return solve(chain, room, segments=self.premises.techniques.recompute)

    def _together(self, way: _Way) -> bool:
        return self.premises.joint is not None and way.parts > 1

    def _share(self, way: _Way, room: int) -> int:
        """What one micro-batch may take: in lockstep each waits for the others with all that it holds."""
        return room // way.parts if self._together(way) else room

    def _outside(self, way: _Way) -> int:
        """Bytes besides activations and their margin."""
        premises, static = self.premises, way.tier.static
        twice = static.largest_gradient if way.parts > 1 else 0
        gradients = static.gradients if _growing(way) else 0  # counted with the activations
        return static.total - gradients + twice + (premises.in_flight if way.spill else 0) + premises.slack

    def _total(self, activations: int, way: _Way) -> int:
        return self._outside(way) + activations + max(int(activations * MARGIN_SHARE), MARGIN_LEAST)

    def _room(self, budget: int, way: _Way) -> int:
        left = budget - self._outside(way)
        room = min(left - MARGIN_LEAST, int(left / (1 + MARGIN_SHARE)))
        # The most that ``_total`` brings to the budget again, to the byte.
        return room + 1 if self._total(room + 1, way) <= budget else room

    def make(self, budget: int) -> TrainPlan:
        """The fastest plan that fits.

        Raises:
            BudgetError: none does; with the minimum, what sets it, and what would lower it.
        """
        self._try_kernels(budget)
        plain = self._plain_within(budget)
        if plain is not None:
            return plain
        found: list[tuple[float, int, _Way, Schedule]] = []
        for number, way in enumerate(self._ways()):
            room = self._room(budget, way)
            if room <= 0:
                continue
            table = self._solve(way, int(room * _ROOMS[0]))
            room = max(0, self._share(way, room) - self._chain_of(way).lasting)
            # The chain rounds up, unit by unit: a schedule of more than the room may fit by the count of storages.
            # One of less may be faster than one that fills it, where freed pages go back before every other kernel.
            for size in dict.fromkeys(max(int(room * factor), table.minimum) for factor in (*_ROOMS, 0.0)):
                schedule = table.best(size)
                found.append((self._seconds(way, schedule), number, way, schedule))
        if budget >= self.minimum()[0]:
            # Others that are as fast may count for more, storage by storage.
            found += [(self._seconds(*each), -1 - number, *each) for number, each in enumerate(self._smallest)]
        tried: set[tuple[int, Schedule]] = set()
        best: TrainPlan | None = None
        for seconds, number, way, schedule in sorted(found, key=lambda each: each[:2]):
            if best is not None and best.predicted_seconds <= seconds:
                break
            if (number, schedule) in tried:
                continue
            tried.add((number, schedule))
            # Where the count by storages says more than the chain (small tensors that are never written out), it is
            # the one to believe.
            plan = self._finished(budget, seconds, way, schedule)
            if plan.predicted_peak <= budget and (best is None or plan.predicted_seconds < best.predicted_seconds):
                best = plan
        if best is None:
            raise self._refusal(budget)
        return best

    def _try_kernels(self, nbytes: int) -> None:
        """Take what kernels hold inside into account, of all whose tensors fit into so many bytes."""
        if nbytes > self._study.room:
            self._study.room = nbytes
            self._count_anew()

    def _count_anew(self) -> None:
        self._chains.clear()
        self._least = self._plain = None

    def _plain_within(self, budget: int) -> TrainPlan | None:
        """The plain step where it fits; the planner's slots are too coarse to see that at the last bytes."""
        premises = self.premises
        if premises.parts not in (None, 1) or premises.tiers[0].window:
            return None
        way = self._plain_way()
        seconds, peak = self.plain()
        items = tuple(Kept(unit) for unit in range(len(self._chain_of(way).chain.units)))
        plan = self._finished(budget, seconds, way, Schedule(seconds, peak, items))
        return plan if plan.predicted_peak <= budget else None

    def _seconds(self, way: _Way, schedule: Schedule) -> float:
        """Of forward and backward of the whole batch; a pass takes longer because it runs on a tape."""
        taping = 0.0 if _is_plain(schedule) else self._chain_of(way).tape.overhead
        return way.parts * (schedule.seconds + taping) + way.tier.seconds

    def _finished(self, budget: int, seconds: float, way: _Way, schedule: Schedule) -> TrainPlan:
        made = self._chain_of(way)
        step, foreseen = self._compiled(way, schedule, budget)
        gradients = way.tier.static.gradients
        if _growing(way):
            counted = foreseen if foreseen is not None else self._counted(way, schedule)[1]
            gradients = min(gradients, counted.gradients)
        activations = self._count(way, schedule, foreseen)
        plain_seconds, plain_activations = self.plain()
        least, limiter = self.minimum()
        spilled = foreseen.spilled if foreseen is not None else 0
        together = way.parts if self._together(way) else 1
        stored = max(0, spilled * together - self.premises.rates.host_room) * (way.parts // together)
        return TrainPlan(
            budget=budget,
            parts=way.parts,
            micro_batch=way.size,
            static=replace(way.tier.static, gradients=gradients),
            tier=way.tier,
            activations=activations - (gradients if _growing(way) else 0),
            predicted_peak=self._total(activations, way),
            predicted_seconds=seconds + (way.parts * foreseen.anew * _ANEW if foreseen is not None else 0.0),
            plain_seconds=plain_seconds,
            plain_peak=self._plain_peak(plain_activations),
            min_budget=least,
            bottleneck=limiter,
            schedule=schedule.describe(made.chain),
            refused=tuple(self._refused()),
            spilled=stored + way.tier.written,
            step=step,
            foreseen=foreseen,
            offloaded=spilled * way.parts if self.premises.rates.host_room else 0,
            at_once=spilled * together,
        )

    def _plain_peak(self, activations: int) -> int:
        way = self._plain_way()
        return self._total(max(activations, _afterwards(way)), way)

    def _counted(self, way: _Way, schedule: Schedule, budget: int | None = None) -> tuple[StepPlan, Foreseen]:
        """The schedule for the tape, and its count by storages."""
        made = self._chain_of(way)
        step = compile_plan(made.tape, made.cuts, made.options, schedule.items)
        room = None
        if budget is not None and self.premises.heap:
            room = self._share(way, usable(budget, way.tier.static.still) - self._outside(way))
        return step, foresee(made.tape, step, room=room)

    def _compiled(self, way: _Way, schedule: Schedule, budget: int) -> tuple[StepPlan | None, Foreseen | None]:
        """What the tape does, and its count by storages; None for the plain step where the heap needs no guard."""
        if way.parts == 1 and _is_plain(schedule):
            total = self._total(self._count(way, schedule, None), way)
            if total * (_KEPT_BY_HEAP if self.premises.heap else 1.0) <= budget:
                return None, None
        return self._counted(way, schedule, budget)

    def _count(self, way: _Way, schedule: Schedule, foreseen: Foreseen | None) -> int:
        """Bytes of activations at the worst moment, and of what takes their place when they are gone."""
        activations = schedule.peak_bound if foreseen is None else foreseen.peak
        if foreseen is not None and self._together(way):
            # All wait at a meeting, or one is in its backward while the others' savings wait for theirs.
            waiting = (way.parts - 1) * foreseen.forward_peak
            activations = waiting + max(foreseen.forward_peak, foreseen.backward_peak)
        return max(activations, _afterwards(way))

    def _refused(self) -> list[str]:
        premises, reasons = self.premises, []
        if premises.splittable:
            reasons.append(f"micro-batches: {premises.splittable}")
        if premises.rates.write is None:
            reasons.append(f"activations on storage: {premises.no_storage}")
        if premises.no_host:
            reasons.append(f"activations in pinned host memory: {premises.no_host}")
        for name in ("recompute", "reduce", "compact", "spill"):
            if not getattr(premises.techniques, name):
                reasons.append(f"{name}: {premises.absent.get(name, 'switched off')}")
        if not premises.accumulate:
            reasons.append("accumulate: switched off")
        if premises.unsafe:
            reasons.append(f"recomputing {len(premises.unsafe)} activations: their replay gave other bits")
        return [*reasons, *premises.notes]

    def _refusal(self, budget: int) -> BudgetError:
        least, limiter = self.minimum()
        while self._study.room < min(least, self.premises.spare):  # or a budget of the minimum is refused in its turn
            self._try_kernels(min(least, self.premises.spare))
            least, limiter = self.minimum()
        lifts = []
        if self.premises.splittable:
            lifts.append(f"the batch is not split ({self.premises.splittable})")
        if self.premises.rates.write is None:
            more = "activations, gradients and optimizer state" if self.premises.heap else "activations"
            lifts.append(f"spill=FOLDER puts {more} on storage")
        lifts.append("a smaller batch takes less")
        needs, allowed = format_apart(least, budget)
        return BudgetError(
            f"a training step needs {needs}, the budget is {allowed}; "
            f"the minimum is set by {limiter}; {'; '.join(lifts)}",
            minimum=least,
            limiter=limiter,
        )


def _afterwards(way: _Way) -> int:
    """What the optimizer's own temporaries take, when the activations are gone and the gradients are all there."""
    static = way.tier.static
    return static.temporaries + (static.gradients if _growing(way) else 0)


def _is_plain(schedule: Schedule) -> bool:
    """Whether nothing is done but what autograd does anyway."""
    return all(isinstance(item, Kept) and item.option == 0 for item in schedule.items)


def _growing(way: _Way) -> bool:
    """Whether gradients are not there before the backward pass makes them."""
    return way.parts == 1 and way.tier.growing
