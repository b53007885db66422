"""Everything that can be known, and refused, before the model is touched or a weight is read."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.arena.device.interface import Device
from narrowboat.arena.slot import Weight
from narrowboat.checkpoint import WeightsIndex, open_index
from narrowboat.errors import BudgetError, ModelError, ProfileError
from narrowboat.machine.malloc import MallocPolicy, allocator_name
from narrowboat.machine.memory import process_memory
from narrowboat.machine.storage_choice import StorageChoice, load_storage_choice
from narrowboat.plan.experts import give_rest, miss_seconds
from narrowboat.plan.group import sweep
from narrowboat.plan.make import check_budget, make_plan, minimum_budget
from narrowboat.plan.model import PAGE, Machine, Workload
from narrowboat.plan.result import Plan
from narrowboat.plan.table import PlanTable
from narrowboat.profile.assumed import module_by_module, refuse_foreign_arguments, weights_owned
from narrowboat.profile.experts import Experts
from narrowboat.profile.measure import estimate_steps
from narrowboat.profile.measured import MeasuredProfile, identity_of, load_profile, read_profile, save_profile
from narrowboat.profile.memory import activation_parts, device_parts, fault_seconds, in_flight_bytes
from narrowboat.profile.skeleton import Matched, build_skeleton, fixed_buffer_bytes, match_weights
from narrowboat.profile.tiles import Tiling
from narrowboat.profile.trace_cache import fingerprint, load_trace, save_trace
from narrowboat.profile.unfused_trace import trace_unfused
from narrowboat.profile.use_trace import TraceError, UseTrace, trace_uses
from narrowboat.profile.warmup import warm_up_stand_ins, warm_up_tracer
from narrowboat.profile.workload import Group, form_groups

NO_EXAMPLE = "no example inputs"
# What an operator says of shapes that do not go together, on fake tensors as on real ones.
_MISFIT = (
    "shapes cannot be multiplied",
    "must have same reduction dim",
    "size mismatch",
    "Given groups=",
    "Given normalized_shape=",
    "to have the same number of channels",
)
_CONTENTION = 0.08  # where it was not measured: 0 to 0.17 were seen in the zoo's models on two cores
# Over the most that a profile's passes took beside the weights: the less is kept, the less varies.
_NEED_MARGIN = {
    MallocPolicy.DEFAULT: 1.1,
    MallocPolicy.GUARDED: 1.02,
    MallocPolicy.BALANCED: 1.1,
    MallocPolicy.LEAN: 1.06,
    MallocPolicy.STRICT: 1.06,
}
_NEED_NOISE = 1 << 20
_ANY = 1 << 62  # a budget that holds anything
_SMALL_PIECES = 2 << 20  # bytes that the heap keeps of them
_PER_WEIGHT = 6 << 10  # bytes of Python and tensor objects per weight: parameter, stand-in, view, entry


@dataclass
class Prepared:
    """A model matched with its weights at rest, and traced.

    Attributes:
        module: the skeleton (or the materialised module as given).
        index: the weights at rest.
        matched: the weights the two have in common.
        trace: what one pass uses; None if it could not be run on fake tensors or there was no example.
        fixed_parts: bytes the budget pays besides weights, by name.
        owned: for each module number, the weights registered on that module itself.
        storage: chunk and depth of reads.
        step_seconds: computing time by step; an estimate until ``measured_under`` says under which policy it was seen.
        policy: how the allocator treats freed activations.
        corrections: bytes by which a policy's reserve is changed after what passes were seen to take.
        together: inputs on their way through the model at once; plans leave room for them.
        in_flight_correction: bytes by which the reserve for each input beyond the first is changed.
        left_behind: bytes that passes under other plans have left in the heap, beyond what is held at rest.
        scheme: how its plans are made: ``"best"``, or one of ``plan.schemes``.
        objective: what they are to make short, of ``plan.model.OBJECTIVES``.
        measured: what is known of passes on this machine, and what that depends on; None without a trace in advance.
        device: what computes; None for the processor.
        tiling: which layers are computed in tiles; None where all are in one piece.
        experts: the stacks whose experts are read on demand; None where there are none, or all fits.
        expert_floor: bytes set aside for experts before ordinary weights get theirs; they get what is left besides.
        least: the smallest budget with which any tiling of the model can be streamed, and what sets it; None until
            ``stream.tiling.fit`` has looked.
        unfused: the same pass without PyTorch's fused attention, where tiles of such layers may be wanted.
        why_untraced: why ``trace`` is None.
        library_bytes: resident memory that what the factory imports, and the tracer, took: the process's, and not
            the model's.
    """

    module: nn.Module
    index: WeightsIndex
    matched: Matched
    trace: UseTrace | None
    fixed_parts: dict[str, int]
    owned: dict[int, list[int]]
    storage: StorageChoice
    step_seconds: tuple[float, ...] = ()
    unfused: UseTrace | None = None
    why_untraced: str = ""
    library_bytes: int = 0
    policy: MallocPolicy = MallocPolicy.DEFAULT
    measured_under: MallocPolicy | None = None
    corrections: dict[MallocPolicy, int] = field(default_factory=dict)
    scheme: str = "best"
    objective: str = "throughput"
    together: int = 1
    in_flight_correction: int = 0
    left_behind: int = 0
    measured: MeasuredProfile | None = None
    device: Device | None = None
    _table: tuple[object, PlanTable] | None = field(default=None, repr=False)
    tiling: Tiling | None = None
    experts: Experts | None = None
    expert_floor: int = 0
    least: tuple[int, str] | None = None
    _groups: tuple[UseTrace | None, list[Group]] | None = field(default=None, repr=False)

    @property
    def at_rest(self) -> int:
        """Bytes beside the weights that a session is thought to hold between passes."""
        cache = self.trace.cache_bytes if self.trace is not None else 0
        return sum(self.fixed_parts.values()) + cache + _SMALL_PIECES

    @property
    def weights(self) -> list[Weight]:
        """All weights, by number."""
        return self.matched.weights

    def machine(self, bandwidth: float) -> Machine:
        """The planner's view of a storage, with what a profile knows of reading and computing beside each other.

        Args:
            bandwidth: bytes per second of a read now.
        """
        known = self.measured.contention if self.measured is not None else None
        beside = self.measured.bandwidths if self.measured is not None else []
        if known is not None and beside:
            bandwidth = min(bandwidth, statistics.median(beside))  # a probe reads while nothing computes
        return Machine(bandwidth=bandwidth, contention=_CONTENTION if known is None else known)

    def workload(self) -> tuple[Workload, list[Group]]:
        """What the planner is given under the policy in force, and the weights each of its blocks stands for."""
        return self._workload(self.policy)

    def choose(self, machine: Machine, budget: int, *, thorough: bool = False) -> tuple[Plan, list[Group]]:
        """Make the plan, and with it choose the allocator policy that gives the shortest predicted pass.

        Args:
            thorough: search on where the plan stays behind its bound (up to a second); a first answer does not wait.

        Raises:
            BudgetError: no policy leaves enough; carries the minimum of the one that needs least.
        """
        plan, groups, self.policy = self.decide(machine, budget, self.together, thorough=thorough)
        return plan, groups

    def decide(
        self, machine: Machine, budget: int, together: int = 1, *, thorough: bool = False
    ) -> tuple[Plan, list[Group], MallocPolicy]:
        """What ``choose`` would choose with ``together`` inputs per sweep, and the policy it would put in force.

        Raises:
            BudgetError: no policy leaves enough.
        """
        least, limiter = self.check(budget)
        self.set_floor(budget)
        best = self._best(self._policies, machine, budget, together, self.left_behind, thorough)
        if best is None and self.left_behind:  # no room for that: as much of it as can be, and the least beside it
            frugal = min(self._policies, key=lambda p: self._workload(p, together)[0].fixed_bytes)
            room = budget - minimum_budget(self._workload(frugal, together)[0])[0]
            best = self._best((frugal,), machine, budget, together, max(room, 0) // PAGE * PAGE, thorough)
            best = best or self._best(self._policies, machine, budget, together, 0, thorough)
        if best is None:  # check() found one that fits; but this scheme, or so many inputs, may need more
            least_of = min(self._policies, key=lambda p: minimum_budget(self._workload(p, together)[0])[0])
            make_plan(self._workload(least_of, together)[0], machine, budget, scheme=self.scheme)
        assert best is not None
        least, limiter = self.least or (least, limiter)
        return replace(self._shared(best[0]), minimum=least, limiter=limiter, tiled=self.tiled), best[1], best[2]

    def _shared(self, plan: Plan) -> Plan:
        """The plan with what it leaves free given to the experts, where they are read on demand."""
        return plan if self.experts is None else give_rest(plan, self.expert_floor, self.experts.total)

    def set_floor(self, budget: int) -> None:
        """Set aside for experts what lets reads and computing overlap, where ``budget`` has twice the room for it."""
        if self.experts is not None:
            self.expert_floor = self.experts.least
            spare = max(budget - self.check(_ANY)[0], 0)
            self.expert_floor += min(spare // 2, max(self.experts.comfort - self.experts.least, 0)) // PAGE * PAGE

    def _best(
        self,
        policies: Iterable[MallocPolicy],
        machine: Machine,
        budget: int,
        together: int,
        left_behind: int,
        thorough: bool,
    ) -> tuple[Plan, list[Group], MallocPolicy] | None:
        best: tuple[Plan, list[Group], MallocPolicy] | None = None
        least = float("inf")
        # Two percent: an allocator that gives memory back has to be worth it. Experts have a use for any memory.
        worth = 0.98 if self.experts is None else 1.0
        for policy in policies:
            workload, groups = self._workload(policy, together, left_behind)
            if best is not None and sum(workload.step_seconds) > least * worth:
                continue
            with contextlib.suppress(BudgetError):
                plan = make_plan(workload, machine, budget, scheme=self.scheme, thorough=thorough)
                seconds = plan.predicted_latency
                if self.experts is not None:  # what the allocator does not take, the experts get
                    seconds += miss_seconds(self._shared(plan), self.experts.total, self.experts.demand)
                if best is None or seconds < least * worth:
                    best, least = (plan, groups, policy), seconds
        return best

    def check(self, budget: int) -> tuple[int, str]:
        """The smallest budget under any allocator policy with these tiles, and the layer that sets it.

        Raises:
            BudgetError: ``budget`` is below it.
        """
        floor = self.expert_floor
        try:
            self.expert_floor = self.experts.least if self.experts is not None else 0
            workloads = [self._workload(policy)[0] for policy in self._policies]
        finally:
            self.expert_floor = floor
        return check_budget(min(workloads, key=lambda w: minimum_budget(w)[0]), budget)

    def look_up(self, machine: Machine, budget: int) -> tuple[Plan, list[Group]]:
        """A plan for another budget: from the table if there is one, which takes no search; else as ``choose``.

        Raises:
            BudgetError: as ``choose``.
        """
        least, limiter = self.check(budget)
        # What the table was made for.
        usual = (self.scheme, self.objective, self.together, self.experts) == ("best", "throughput", 1, None)
        found = self._plan_table(machine, (least, limiter)).best(budget) if usual else None
        if found is None:
            return self.choose(machine, budget)
        self.policy = MallocPolicy(found.policy)
        return replace(found.plan, minimum=least, limiter=limiter), self._workload(self.policy)[1]

    def _plan_table(self, machine: Machine, least: tuple[int, str]) -> PlanTable:
        rows = self.measured.table if self.measured is not None else []
        made_from = (machine, self.step_seconds, tuple(self.corrections.items()), self.left_behind, len(rows))
        if self._table is None or self._table[0] != made_from:
            workloads = {p.value: self._workload(p, left_behind=self.left_behind)[0] for p in self._policies}
            try:
                table = PlanTable.from_json(rows, workloads, machine, least)
            except (KeyError, TypeError, ValueError, IndexError):
                table = PlanTable([])  # kept by another version
            self._table = made_from, table
        return self._table[1]

    def learn(self, step_seconds: Sequence[float], slow: float, bandwidth: float) -> None:
        """Take in what a pass took, and keep it for later processes.

        Args:
            step_seconds: computing time of each step, seconds.
            slow: the factor by which reading beside it is thought to have slowed it down.
            bandwidth: of the storage during it, bytes per second.
        """
        self.step_seconds = tuple(seconds / slow for seconds in step_seconds)
        self.measured_under = self.policy
        if self.measured is not None:
            self.measured.step_seconds = list(self.step_seconds)
            self.measured.policy = self.policy.value
            self.measured.bandwidths = self.measured.bandwidths or [bandwidth]
            save_profile(self.measured)

    def reserve_for(self, nbytes: int) -> None:
        """A trace that a real pass made knows no activations: set aside what the pass took beside the weights."""
        self.fixed_parts["activations"] = max(nbytes, 0)

    def take(self, path: Path) -> None:
        """Plan from the profile in a file.

        Raises:
            ProfileError: it cannot be read, or is of another model, input, machine or setting.
        """
        if self.measured is None:
            raise ProfileError(f"profile {path} cannot be used: the model was not traced ({self.why_untraced})")
        found = read_profile(path, self.measured.identity)
        if self.trace is None or len(found.step_seconds) != len(self.trace.uses):
            raise ProfileError(f"{path} was measured with another trace: measure anew with narrowboat profile")
        self.measured, self.step_seconds = found, tuple(found.step_seconds)
        self.measured_under = MallocPolicy(found.policy)

    def correct(self, nbytes: int) -> None:
        """Change the reserve of the policy in force."""
        self.corrections[self.policy] = self.corrections.get(self.policy, 0) + nbytes

    def enough(self) -> int:
        """A budget in bytes that holds everything under any allocator policy."""
        workloads = [self._workload(policy)[0] for policy in self._policies]
        more = self.experts.total - self.expert_floor if self.experts is not None else 0
        return max(w.weight_bytes + w.fixed_bytes for w in workloads) + more

    def holds_all(self, budget: int) -> bool:
        """Whether everything could stay in ``budget`` bytes under some allocator policy."""
        workloads = [self._workload(policy)[0] for policy in self._policies]
        return any(w.weight_bytes + w.fixed_bytes <= budget for w in workloads)

    @property
    def tiled(self) -> tuple[tuple[str, int], ...]:
        """The layers cut, by name, each with its number of pieces; 0 for a table whose rows are read on demand."""
        layers = self.tiling.layers if self.tiling else ()
        return tuple((layer.name, 0 if layer.table else max(len(layer.tiles), 1) * layer.strips) for layer in layers)

    @property
    def _policies(self) -> tuple[MallocPolicy, ...]:
        if self.trace is None or self.device is not None or allocator_name() != "glibc":
            return (self.policy,)
        return tuple(MallocPolicy)

    def remake(self, machine: Machine, budget: int, before: Plan) -> tuple[Plan, list[Group]]:
        """Plan anew under the policy in force, from what has been measured since; searches on while it pays."""
        workload, groups = self._workload(self.policy, left_behind=self.left_behind)
        try:
            plan = make_plan(workload, machine, budget, scheme=self.scheme, thorough=True)
        except BudgetError:
            workload, groups = self._workload(self.policy)
            plan = make_plan(workload, machine, budget, scheme=self.scheme, thorough=True)
        least = min(plan.minimum, before.minimum)
        return replace(self._shared(plan), minimum=least, limiter=before.limiter, tiled=self.tiled), groups

    def _workload(self, policy: MallocPolicy, together: int = 1, left_behind: int = 0) -> tuple[Workload, list[Group]]:
        trace = self.trace if self.trace is not None else module_by_module(self.owned)
        if self._groups is None or self._groups[0] is not self.trace:
            self._groups = (self.trace, form_groups(trace, self.weights, packed=self.index.packed))
        groups = self._groups[1]
        seconds = self.step_seconds or tuple(1e-3 for _ in trace.uses)
        reserved = dict(self.fixed_parts)
        if self.experts is not None:
            reserved["experts"] = self.expert_floor
        if self.trace is not None and self.trace.activation_bytes:
            on_device = self.device is not None
            reserved.update(device_parts(trace) if on_device else activation_parts(trace, policy))
            if trace.cache_bytes:
                reserved["activations"] = max(reserved["activations"] - trace.cache_bytes, 0)
                reserved["kv-cache"] = trace.cache_bytes
            correction = self.corrections.get(policy, 0)
            if together > 1:
                correction = max(correction, 0)  # what single passes did not need, several heaps may
            elif self.measured is not None and policy.value in self.measured.needs:
                beside = sum(reserved.values()) - reserved["allocator"]
                need = int(self.measured.needs[policy.value] * _NEED_MARGIN[policy]) + _NEED_NOISE
                reserved["allocator"] = max(need - beside, 0)
            reserved["allocator"] = max(reserved["allocator"] + correction, 0) + (0 if together > 1 else left_behind)
            slower = self._pace(trace, policy, sum(seconds))
            if slower != 1.0:
                seconds = tuple(s * slower for s in seconds)
        parts = tuple(reserved.items())
        slowed = self.measured.slowed if self.measured is not None else []
        workload = Workload(
            tuple(g.block for g in groups),
            seconds,
            sum(nbytes for _, nbytes in parts),
            parts,
            tuple(s * factor for s, factor in zip(seconds, slowed, strict=False)) if slowed else (),
            from_idle=self.objective == "latency",
        )
        if together == 1:
            return workload, groups
        boundaries = {first for block in workload.blocks for first, _ in block.holds}
        each = in_flight_bytes(trace, boundaries, policy, torch.get_num_threads()) + self.in_flight_correction
        # What an earlier map's threads have left behind, the next one's use again.
        return sweep(workload, together, max(each, left_behind // (together - 1))), groups

    def _pace(self, trace: UseTrace, policy: MallocPolicy, seconds: float) -> float:
        """The factor from the computing times known to those under ``policy``."""
        under, paces = self.measured_under, self.measured.paces if self.measured is not None else {}
        if under is not None and under.value in paces and policy.value in paces:
            return paces[policy.value] / max(paces[under.value], 1e-9)
        faults = fault_seconds(trace, policy)
        if under is not None:
            faults -= fault_seconds(trace, under)  # those are in the times already
        return max(1 + faults / max(seconds, 1e-9), 0.2)


def prepare(
    model: Callable[[], nn.Module] | nn.Module,
    weights: str | Path | WeightsIndex,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    *,
    strict: bool = True,
    device: Device | None = None,
) -> Prepared:
    """Build the skeleton, open the weights, match them, and trace one pass on fake tensors.

    Args:
        model: factory or module.
        weights: file or folder, or the index of one.
        example: ``(args, kwargs)`` of one pass, or None.
        strict: refuse tensors in the file that the model does not have.
        device: what computes; None for the processor.
    """
    before, loaded = process_memory().rss, len(sys.modules)
    module = build_skeleton(model)
    built = process_memory().rss - before if len(sys.modules) > loaded else 0
    index = weights if isinstance(weights, WeightsIndex) else open_index(weights)
    index.require_streamable()
    matched = match_weights(module, index, strict=strict)
    bookkeeping = _PER_WEIGHT * len(matched.weights)
    # What a factory imports (transformers: 150 MiB) is the process's, like torch; the skeleton is the session's.
    libraries = max(built - bookkeeping, 0)
    trace: UseTrace | None = None
    unfused: UseTrace | None = None
    measured: MeasuredProfile | None = None
    why = NO_EXAMPLE
    if example is not None:
        refuse_foreign_arguments(module, example)
        key = fingerprint(module, *example)
        trace = load_trace(key)
        if trace is None:
            before = process_memory().rss
            warm_up_tracer()
            libraries += max(process_memory().rss - before, 0)
            try:
                trace = trace_uses(module, matched.numbers, *example)
                save_trace(key, trace)
            except TraceError as error:
                why = str(error)
                if any(phrase in why for phrase in _MISFIT):
                    raise ModelError(f"the example inputs do not fit {type(module).__name__}: {why}") from error
        if trace is not None:
            unfused = trace_unfused(module, matched.numbers, example, trace, key)
            identity = identity_of(key, index.digest, device.name if device is not None else "")
            measured = load_profile(identity) or MeasuredProfile(identity, "", [])
            if len(measured.step_seconds) != len(trace.uses):
                measured = MeasuredProfile(identity, "", [])
    if trace is None:  # passes load what their operators meet
        before = process_memory().rss
        warm_up_stand_ins()
        libraries += max(process_memory().rss - before, 0)
    known = measured is not None and bool(measured.step_seconds)
    storage = load_storage_choice(index.files[0])
    parts = {"buffers": fixed_buffer_bytes(module)}
    if device is not None:  # its memory is counted, and the host's is another budget
        parts["chunks"] = device.granularity
        parts["workspace"] = device.workspace
    else:
        if not index.packed:
            storage = storage.for_copies()
            parts["staging"] = storage.staging_bytes
        parts["bookkeeping"] = bookkeeping
    return Prepared(
        module,
        index,
        matched,
        trace,
        parts,
        weights_owned(module, matched.numbers),
        storage,
        step_seconds=_step_seconds(trace, measured if known else None),
        unfused=unfused,
        why_untraced="" if trace is not None else why,
        library_bytes=libraries,
        measured_under=MallocPolicy(measured.policy) if measured is not None and known else None,
        measured=measured,
        device=device,
    )


def _step_seconds(trace: UseTrace | None, measured: MeasuredProfile | None) -> tuple[float, ...]:
    if measured is not None:
        return tuple(measured.step_seconds)
    return estimate_steps(trace) if trace is not None else ()
