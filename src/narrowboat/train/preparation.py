"""From a batch to a plan: measure such a batch once, check it, and plan for any budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from narrowboat.errors import TrainingError
from narrowboat.quantities import format_bytes
from narrowboat.train.batch_statistics import (
    frozen_batch_norm,
    modules_that_move_with_each_pass,
    modules_with_batch_statistics,
)
from narrowboat.train.containers import Containers
from narrowboat.train.device.spill import DeviceSpillPool
from narrowboat.train.fuse import Fusion
from narrowboat.train.lockstep import run_as_one_of_many
from narrowboat.train.loss import LossPlan
from narrowboat.train.loss_trace import plan_loss
from narrowboat.train.low_memory import LowMemoryLoss
from narrowboat.train.measure.chain import Rates
from narrowboat.train.measure.study import Study, study, timing_sizes
from narrowboat.train.memory import MeasuredMemory
from narrowboat.train.micro_batch import batch_size, is_whole, samples_in, whole
from narrowboat.train.options import check_parts
from narrowboat.train.passes import Backward, Passes
from narrowboat.train.plan import Planner, TrainPlan
from narrowboat.train.premises import Premises
from narrowboat.train.quiet import quiet_on_fake_tensors
from narrowboat.train.replay_check import keep_what_differs
from narrowboat.train.signature import signature
from narrowboat.train.spill import SpillPool
from narrowboat.train.spill_room import plan_with_room
from narrowboat.train.split_check import SplitVerdict, check_splits
from narrowboat.train.split_watch import SplitWatch
from narrowboat.train.static import StaticBytes, batch_bytes, state_there, static_bytes
from narrowboat.train.switches import Switches
from narrowboat.train.tape.structure import Tape
from narrowboat.train.tiers import tiers
from narrowboat.train.uncut import can_be_cut
from narrowboat.train.weights import TrainingWeights

log = logging.getLogger("narrowboat")
_CHECKED = 4  # samples of the check of splitting
_COPY = 64 << 20  # bytes of its float64 copy of the model


@dataclass(slots=True)
class Preparation:
    """Plans for one model, loss and optimizer.

    Attributes:
        model: as it is called (perhaps a ``DistributedDataParallel``), and ``inner``: the module itself.
        loss_fn: of output and targets, or None.
        optimizer: over ``inner``'s parameters.
        switches: what may be used.
        batch_norm: one of ``options.BATCH_NORM``.
        backward: how a loss is sent backwards.
        rates: of the machine, ``pool``: for activations on storage, and ``in_flight``: what it may hold.
        weights: the model's weights on storage, or None.
        count: the user's count of what a loss averages over.
        micro_batches: their number, if it is given.
        scaled: a gradient scaler is used.
        step_in_backward: gradients are stepped as they come and are never all there.
        fusion: compiles blocks; None where that was not asked for.
        memory: that the budget counts.
        no_host: why activations do not go from a device to pinned host memory; "" where they may, and on the host.
        tell: is told what was found between steps, in words.
    """

    model: nn.Module
    inner: nn.Module
    loss_fn: Callable[..., Any] | None
    optimizer: torch.optim.Optimizer
    switches: Switches
    batch_norm: str
    backward: Backward
    rates: Rates
    pool: SpillPool | DeviceSpillPool | None
    in_flight: int
    memory: MeasuredMemory
    weights: TrainingWeights | None = None
    count: Callable[[Any, Any], Any] | None = None
    micro_batches: int | None = None
    scaled: bool = False
    step_in_backward: bool = False
    fusion: Fusion | None = None
    no_host: str = ""
    whole: StaticBytes | None = None
    tell: Callable[[str], None] = log.warning
    _left: int = 0
    _watches: dict[Hashable, SplitWatch] = field(default_factory=dict)
    _rooms: dict[Hashable, _Room] = field(default_factory=dict)
    _uncut: dict[Hashable, bool] = field(default_factory=dict)
    _planners: dict[Hashable, Planner] = field(default_factory=dict)
    _passes: dict[Hashable, Passes] = field(default_factory=dict)
    _plans: dict[tuple[Hashable, int], TrainPlan] = field(default_factory=dict)

    def divided(self, inputs: Any, targets: Any) -> Any:
        """The inputs; marked, where a batch like this cannot be cut along dimension 0 (adjacency, sequence first)."""
        try:
            key = signature(self.inner, inputs, targets)
        except TrainingError:  # samples of inputs and targets are counted in different dimensions
            return whole(inputs)
        if key not in self._planners and key not in self._uncut:
            with self.frozen(), self._as_before():
                self._uncut[key] = not can_be_cut(self.inner, self.loss_fn, inputs, targets)
        return whole(inputs) if self._uncut.get(key) else inputs

    def plan(self, inputs: Any, targets: Any, budget: int) -> tuple[TrainPlan, Passes]:
        """The plan for such a batch in so many bytes, and what runs it.

        Raises:
            BudgetError: no plan fits.
            LossError: the loss is not a scalar.
            TrainingError: the batch is empty, or model or loss fail on it.
            UsageError: more micro-batches are asked for than it has samples.
        """
        key, samples = signature(self.inner, inputs, targets), samples_in(inputs, targets)
        measured = key in self._planners and samples <= self._planners[key].batch
        if not measured or (key, budget) not in self._plans:
            with self._as_before():
                if not measured:
                    self.memory.before_measuring()
                    with self.frozen():
                        self._measure(key, inputs, targets, budget)
                    self._left += self.memory.left_behind()
                    # It is there, whether the step is refused or not: no reason to refuse what another process
                    # was told to be the minimum, where it may be some bytes less.
                    room = budget - self._planners[key].minimum()[0]
                    left = max(self._left, self.memory.workspace)  # which nothing may have asked for yet
                    self._planners[key].reserve(left if room < 0 else min(left, room))
                    self._forget_plans(key)
                self._plan_for(key, budget)
        # The plan may be new while the batch it was found splittable with is not: another budget, bytes set aside.
        if measured and self._plans[(key, budget)].parts > 1 and not self._still_splits(key, inputs, targets):
            self._plan_for(key, budget)
        plan = self._plans[(key, budget)]
        return (plan.for_samples(samples) if samples < self._planners[key].batch else plan), self._passes[key]

    def _plan_for(self, key: Hashable, budget: int) -> None:
        self._plans[(key, budget)] = plan = plan_with_room(self._planners[key], budget, self.pool, self.tell)
        log.info("plan for %s:\n%s", format_bytes(budget), plan)

    def _still_splits(self, key: Hashable, inputs: Any, targets: Any) -> bool:
        """What the first batch allowed is looked at again from time to time, while such batches are split."""
        watch = self._watches[key]
        if not watch.due(inputs, targets):
            return True
        try:
            with self._as_before():
                samples, copies = self._rooms[key].for_check(state_there(self.optimizer))
                verdict = self._tried(self._passes[key].loss_plan, samples, copies, inputs, targets, watch.newly)
        finally:
            self.memory.tidy()
        # No room, or not to be told from these samples: what was found before holds.
        reason = "" if verdict is None or verdict.kind == "unknown" else self._reason_of(verdict)
        if reason:
            self._refuse_parts(reason)
            self.tell(f"such batches are no longer split: {reason}")
            self._planners[key].keep_whole(reason)
            self._forget_plans(key)
        return not reason

    def _forget_plans(self, key: Hashable) -> None:
        self._plans = {known: plan for known, plan in self._plans.items() if known[0] != key}

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Whatever happens inside, what loss and count reach stays; what the model reaches, each pass puts back."""
        reached = Containers([self.loss_fn, self.count])
        try:
            yield
        finally:
            reached.restore()

    def planner(self, inputs: Any, targets: Any) -> Planner:
        """The planner of such batches, which were planned for before."""
        return self._planners[signature(self.inner, inputs, targets)]

    def reserve(self, slack: int) -> None:
        """Plan from now on with so many bytes more for what kernels and the allocator take beside tensors."""
        for planner in self._planners.values():
            planner.reserve(slack)
        self._plans.clear()

    def frozen(self) -> AbstractContextManager[Any]:
        """BatchNorm in eval mode, where that was asked for."""
        return frozen_batch_norm(self.inner) if self.batch_norm == "frozen" else nullcontext()

    def _measure(self, key: Hashable, inputs: Any, targets: Any, budget: int) -> None:
        if is_whole(inputs) and self.micro_batches not in (None, 1):
            raise TrainingError(
                f"micro_batches={self.micro_batches}: the batch cannot be cut along dimension 0; leave it out"
            )
        check_parts(self.micro_batches, batch_size(inputs, targets))
        loss_plan = plan_loss(self.inner, self.loss_fn, inputs, targets, count=self.count)
        coupled = modules_with_batch_statistics(self.inner)
        low_memory, reason = self._low_memory(coupled, inputs, targets)
        passes = Passes(
            self.model,
            self.loss_fn,
            loss_plan,
            self.pool,
            self.backward,
            check_finite=not self.scaled,
            lockstep=self.batch_norm == "lockstep" and bool(coupled),
            low_memory=low_memory,
        )
        inner = Passes(self.inner, self.loss_fn, loss_plan, None, torch.Tensor.backward, low_memory=low_memory)

        @quiet_on_fake_tensors
        def forward(some_inputs: Any, some_targets: Any) -> torch.Tensor:
            return inner.loss(some_inputs, some_targets)[0]

        def together(some_inputs: Any, some_targets: Any) -> torch.Tensor:
            return run_as_one_of_many(self.inner, lambda: forward(some_inputs, some_targets))

        if self.fusion is not None:
            self.fusion.prepare(forward, inputs, targets)
        made = self._study(forward, inputs, targets)
        made.room = budget
        self.whole = self.whole or static_bytes(self.inner, self.optimizer, inputs, targets)
        # DistributedDataParallel has buckets of its own for gradients on their way, from the beginning.
        copies = 1 if self.model is self.inner else 2
        static = replace(
            self.whole,
            gradients=copies * self.whole.gradients,
            batch=batch_bytes(inputs, targets),
        )
        held = static.weights + static.gradients + static.batch
        spare = self.memory.spare(static)
        room = min(budget, spare) - held
        self._rooms[key], self._watches[key] = _Room(made, room, spare - held), SplitWatch(inputs, targets)
        fitting = timing_sizes(
            made.batch, lambda size: made.tape(size).saved_bytes * 1.5 < room, large=not self.memory.on_host
        )
        if fitting:
            made.time(self.inner, forward, inputs, targets, fitting)
        premises = Premises(
            tiers=tuple(
                tiers(
                    static,
                    budget,
                    rates=self.rates,
                    in_backward=self.step_in_backward,
                    storage=self.switches.state
                    and not self.scaled
                    and self.model is self.inner
                    and self.memory.on_host,
                    weights=self.weights,
                    growing=self.model is self.inner,
                )
            ),
            splittable=self._why_not_split(loss_plan, coupled, self._rooms[key], inputs, targets),
            techniques=self.switches.planner if self.memory.on_host else replace(self.switches.planner, compact=False),
            rates=self.rates,
            in_flight=self.in_flight,
            spare=spare,
            accumulate=self.switches.accumulate,
            parts=self.micro_batches,
            joint=self._study(together, inputs, targets).timed_as(made) if passes.lockstep else None,
            slack=self.memory.slack
            + (low_memory.inside(batch_size(inputs, targets)) if low_memory is not None else 0),
            no_host=self.no_host,
            absent={} if self.memory.on_host else {"compact": "masks and indices on a device stay as they are"},
            heap=self.memory.on_host,
            notes=(*(self.fusion.reasons if self.fusion is not None else ()), *([reason] if reason else [])),
        )
        planner = Planner(made, premises)
        self.memory.tidy()
        keep_what_differs(planner, self.inner, forward, inputs, targets)
        self._planners[key], self._passes[key] = planner, passes

    def _study(self, forward: Callable[[Any, Any], torch.Tensor], inputs: Any, targets: Any) -> Study:
        return study(self.inner, forward, inputs, targets, clock=self.memory.clock, tidy=self.memory.tidy)

    def _low_memory(self, coupled: list[str], inputs: Any, targets: Any) -> tuple[LowMemoryLoss | None, str]:
        """What computes the loss without its logits, or None and why not ("" where nobody asked for it)."""
        if not self.switches.low_memory:
            return None, ""
        if self.model is not self.inner:
            return None, "low_memory: not under DistributedDataParallel"
        if self.batch_norm == "lockstep" and coupled:
            return None, "low_memory: not where micro-batches meet at each BatchNorm"
        return LowMemoryLoss.of(self.inner, self.loss_fn, inputs, targets)

    def _why_not_split(self, loss_plan: LossPlan, coupled: list[str], room: _Room, inputs: Any, targets: Any) -> str:
        """Why the batch must not be split; "" if it may.

        Raises:
            TrainingError: it must not, but a number of micro-batches was asked for.
        """
        if is_whole(inputs):
            return "the batch cannot be cut along dimension 0"
        if batch_size(inputs, targets) < 2:
            return "the batch has one sample"
        if self.micro_batches == 1 or not self.switches.accumulate:
            return ""
        reason = self._coupling(loss_plan, coupled, room, inputs, targets)
        if reason:
            self._refuse_parts(reason)
        return reason

    def _refuse_parts(self, reason: str) -> None:
        if self.micro_batches is not None:
            raise TrainingError(
                f"micro_batches={self.micro_batches} would not give the gradients of the whole batch: {reason}; leave "
                "micro_batches out (the batch is recomputed instead of split), or see batch_norm= and count="
            )

    def _coupling(self, loss_plan: LossPlan, coupled: list[str], room: _Room, inputs: Any, targets: Any) -> str:
        if self.batch_norm in ("auto", "never") and coupled:
            return f"{coupled[0]} takes its statistics from the whole batch ({len(coupled)} such modules)"
        moving = modules_that_move_with_each_pass(self.inner)
        if moving:
            return f"{moving[0]} changes with each forward pass"
        verdict = self._tried(loss_plan, *room.for_check(state_there(self.optimizer)), inputs, targets)
        return "there is no room to try it on two samples" if verdict is None else self._reason_of(verdict)

    def _tried(
        self, loss_plan: LossPlan, samples: int, copies: int, inputs: Any, targets: Any, features: Sequence[int] = ()
    ) -> SplitVerdict | None:
        """A few samples whole and in parts; None where there is no room for two."""
        if samples < 2:
            return None
        return check_splits(
            self.inner,
            self.loss_fn,
            inputs,
            targets,
            loss_plan,
            samples=samples,
            copy_limit=copies,
            features=features,
        )

    def _reason_of(self, verdict: SplitVerdict) -> str:
        if verdict and verdict.moving and self.batch_norm not in ("lockstep", "ghost"):
            return f"buffer {verdict.moving[0]} changes with each forward pass"
        return "" if verdict else verdict.reason


@dataclass(frozen=True, slots=True)
class _Room:
    """What trying things out may take.

    Attributes:
        study: tells what a pass holds.
        nbytes: of the budget, beside weights, one set of gradients and the batch.
        spare: the same of what the machine has. Where the budget has no room for two samples as the plain step takes
            them, it may still be enough for a batch in parts, if only that were known.
    """

    study: Study
    nbytes: int
    spare: int

    def for_check(self, state: int) -> tuple[int, int]:
        """Samples for the check of splitting (none where not even two fit), and bytes for a float64 copy.

        Args:
            state: bytes of the optimizer's state that are there.
        """
        if self.study.batch < 2:
            return 0, 0
        held = 0
        for samples in (_CHECKED, 2):
            if samples > self.study.batch:
                continue
            tape = self.study.tape(samples)
            held = int(tape.saved_bytes * 1.5)
            # The copy, its gradients, and activations of twice the bytes.
            copies = (self.nbytes - state - 2 * held - _columns(tape)) // 2
            if copies > 0:
                return samples, min(copies, _COPY)
        # In the model's own precision.
        return (2 if held <= max(self.nbytes, self.spare) - state else 0), 0


def _columns(tape: Tape) -> int:
    """Bytes of the largest convolution's unfolded input: in float64 there is no kernel that does without."""
    most = 0
    for op in tape.ops:
        if op.call is not None and op.name.endswith("convolution"):
            x, weight = op.call.args[:2]
            entries = max(math.prod(x.shape), op.call.made // x.dtype.itemsize)
            most = max(most, entries * math.prod(weight.shape[2:]) * torch.float64.itemsize)
    return 2 * most
