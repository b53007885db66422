"""``train_step``: forward, backward and optimizer of one batch inside a number of bytes.

The first call with a kind of batch measures it, checks the loss and whether it may be split, and plans
(``preparation``). Every call runs the plan that the budget in force allows (``passes``), steps the optimizer where its
state is (``update``), and records prediction beside measurement (``report``). A step that runs out of memory is given
up before the optimizer has seen anything, everything it changed is put back, and it is done again on a smaller plan.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import nn

from narrowboat.checkpoint import WeightsIndex
from narrowboat.errors import TrainingError, UsageError
from narrowboat.machine.data_limit import data_limit, is_out_of_memory
from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy
from narrowboat.machine.memory import reset_peak
from narrowboat.machine.whole_heap import STRETCH, give_back, open_whole_heap
from narrowboat.quantities import format_bytes
from narrowboat.train.budget import BudgetInForce
from narrowboat.train.distributed import Ranks
from narrowboat.train.footprint import Footprint
from narrowboat.train.forked import Home
from narrowboat.train.fuse import Fusion
from narrowboat.train.heap_guard import HeapGuard, NoHeap
from narrowboat.train.measure.chain import Rates
from narrowboat.train.options import (
    check_functions,
    check_model,
    check_names,
    check_optimizer,
    check_settings,
    folder_of,
)
from narrowboat.train.passes import Outcome, drain_autograd
from narrowboat.train.plan import TrainPlan
from narrowboat.train.preparation import Preparation
from narrowboat.train.report import Report, StepRecord
from narrowboat.train.snapshot import Snapshot
from narrowboat.train.spill import SpillPool, measure_bandwidth
from narrowboat.train.stored_update import StoredUpdate
from narrowboat.train.switches import Switches
from narrowboat.train.update import Update
from narrowboat.train.weights import TrainingWeights
from narrowboat.train.weights.export import save_weights
from narrowboat.train.weights_of import weights_on_storage

log = logging.getLogger("narrowboat")

_SMALLER = 0.8  # of the budget, after a step that ran out of memory
_MOST_ATTEMPTS = 8
_IN_FLIGHT = 16 << 20  # bytes of activations on their way to or from storage
_LEARNING = 3  # steps
_SMALL_PLAN = 16 << 20  # bytes of activations
_ENFORCED = 256 << 20  # beyond the plan, before an allocation is refused: threads' heaps, libraries


class TrainStep:
    """One optimizer step per call, inside a budget, with the gradients of the plain step; made by ``train_step``.

    Attributes:
        model: as it was given.
        optimizer: as it was given; its schedulers work as ever.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        optimizer: torch.optim.Optimizer,
        *,
        budget: int | str = "auto",
        spill: str | Path | None = None,
        weights: str | Path | WeightsIndex | None = None,
        batch_norm: str = "auto",
        techniques: Iterable[str] | None = None,
        micro_batches: int | None = None,
        clip_grad_norm: float | None = None,
        scaler: Any = None,
        count: Callable[[Any, Any], Any] | None = None,
        in_backward: bool = False,
        resume: bool = False,
        adapt: bool = True,
        enforce: bool = True,
    ) -> None:
        check_model(model)
        check_functions(loss_fn, scaler, count)
        check_settings(batch_norm, clip_grad_norm, micro_batches)
        if in_backward and scaler is not None:
            raise UsageError(
                "in_backward=True steps before a GradScaler has seen all gradients; leave one of them out"
            )
        self.model = model
        self.optimizer = optimizer
        self._ranks = Ranks(model)
        self._inner = self._ranks.model
        self._clip, self._scaler = clip_grad_norm, scaler
        self._in_backward, self._enforce = in_backward, enforce
        check_optimizer(self._inner, optimizer)
        switches = Switches.of(techniques)
        self._budget = BudgetInForce(budget, adapt=adapt)
        self._folder = folder_of(spill)
        self._fusion = Fusion(self._inner) if switches.fuse else None
        self._pool: SpillPool | None = None
        rates = Rates()
        if self._folder is not None:
            self._pool = SpillPool(self._folder, in_flight=_IN_FLIGHT)
            write, read = measure_bandwidth(self._folder)
            rates = Rates(write=1 / write, read=1 / read)
        self._weights: TrainingWeights | None = None
        try:
            self._weights = weights_on_storage(
                self._inner, weights, self._budget.now, store=self._folder, resume=resume
            )
        except BaseException:
            if self._pool is not None:
                self._pool.close()
            raise
        self._footprint = Footprint(self._inner, optimizer, self._weights)
        self._preparation = Preparation(
            model=model,
            inner=self._inner,
            loss_fn=loss_fn,
            optimizer=optimizer,
            switches=switches,
            batch_norm=batch_norm,
            backward=self._send_back,
            rates=rates,
            pool=self._pool,
            in_flight=_IN_FLIGHT + (self._pool.staging_bytes if self._pool is not None else 0),
            weights=self._weights,
            count=count,
            micro_batches=micro_batches,
            scaled=scaler is not None,
            step_in_backward=in_backward and clip_grad_norm is None,
            fusion=self._fusion,
            footprint=self._footprint,
            tell=self._tell,
        )
        self._last: TrainPlan | None = None
        self._update: Update | StoredUpdate | None = None
        self._report = Report()
        self._steps_done = self._weights.steps_done if self._weights is not None else 0
        self._home = Home()
        self._closed = False
        self._policy: MallocPolicy | None = None

    # -- for the user --------------------------------------------------------------------------------------------

    @property
    def budget(self) -> int:
        """Bytes in force; may be set between steps (an int or "1.5GiB")."""
        return self._budget.now

    @budget.setter
    def budget(self, value: int | str) -> None:
        self._budget.set(value)

    @property
    def plan(self) -> TrainPlan:
        """The plan of the last step, or of ``prepare``.

        Raises:
            TrainingError: there is none yet.
        """
        if self._last is None:
            raise TrainingError(
                "no step was made yet, so there is no plan: call step.prepare(inputs, targets) with a batch"
            )
        return self._last

    @property
    def steps_done(self) -> int:
        """Optimizer steps made by calls; with ``resume=True`` counting those that were stored by the runs before."""
        return self._steps_done

    def report(self) -> Report:
        """Prediction and measurement of every step."""
        return self._report

    def prepare(self, inputs: Any, targets: Any = None) -> TrainPlan:
        """Measure and plan for such batches without making a step; model and optimizer stay as they are.

        Raises:
            BudgetError: no plan fits, with the minimum and the part that sets it.
            LossError: the loss is not a scalar.
            TrainingError: the batch is empty, or model or loss fail on it.
        """
        self._check_open()
        inputs = self._preparation.divided(inputs, targets)
        self._footprint.begin(inputs, targets)
        self._budget.follow(self._footprint.held(), self._footprint.addresses())
        self._last, _ = self._preparation.plan(inputs, targets, self._budget.now)
        return self._last

    def __call__(self, inputs: Any, targets: Any = None) -> torch.Tensor:
        """Train on one batch.

        Args:
            inputs: a tensor; a tuple (positional arguments of the model) or a mapping (keyword arguments).
            targets: what ``loss_fn`` gets beside the model's output; None where the inputs hold the labels.

        Returns:
            The loss of the whole batch before the step, detached, 0-dim.

        Raises:
            BudgetError: no plan fits the budget; nothing was changed.
            LossError: the loss is not a finite scalar; nothing was changed.
            TrainingError: the batch is empty, model or loss fail while it is measured, this is a forked child, or out
                of memory on the smallest plan as well; nothing was changed.
        """
        start = time.perf_counter()
        outcome, record, update = self._gradients(inputs, targets, None)
        update.finish()
        self._steps_done += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self._weights is not None:
            self._weights.end_step()
        self._note(outcome, record, start)
        return outcome.loss

    def backward(self, inputs: Any, targets: Any = None) -> torch.Tensor:
        """Forward and backward only: leaves the gradients in ``.grad`` for a loop that steps by itself.

        Gradients that are there already are replaced. Returns and errors as for a call.
        """
        start = time.perf_counter()
        outcome, record, _ = self._gradients(inputs, targets, "memory")
        self._note(outcome, record, start)
        return outcome.loss

    def close(self, *, restore: bool = True) -> None:
        """Close the files; model and optimizer go on without narrowboat.

        Args:
            restore: bring optimizer state that is on storage back into memory. False where nobody goes on with it.
        """
        if self._home.left:
            self._closed = True  # what there is to close is the parent's
            return
        if self._update is not None:
            self._update.close(restore=restore)
            self._update = None
        if self._pool is not None:
            self._pool.close()
        if self._weights is not None:
            self._weights.close()
        if self._fusion is not None:
            self._fusion.close()
        if self._policy is not None:
            set_malloc_policy(MallocPolicy.DEFAULT)
            self._policy = None
        self._closed = True

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model's weights as they are now to a safetensors file, one tensor at a time.

        Raises:
            UsageError: ``path`` exists, or is a folder.
            StorageError: the disk is full, or the storage failed; nothing is left behind.
        """
        save_weights(self._inner, Path(path), overwrite=overwrite)

    def __enter__(self) -> TrainStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise UsageError(
            "a training step has threads, files and hooks, and cannot be copied or pickled: save model.state_dict() "
            "and optimizer.state_dict() instead, and make another step with train_step"
        )

    def _tell(self, what: str, level: int = logging.WARNING) -> None:
        log.log(level, "%s", what)
        self._report.changes.append((self._report.count, what))

    # -- one step ------------------------------------------------------------------------------------------------

    def _gradients(
        self, inputs: Any, targets: Any, tier: str | None
    ) -> tuple[Outcome, StepRecord, Update | StoredUpdate]:
        self._check_open()
        with self._ranks.together():
            inputs = self._preparation.divided(inputs, targets)
        self._footprint.begin(inputs, targets)
        if change := self._budget.follow(self._footprint.held(), self._footprint.addresses()):
            self._tell(change, logging.INFO)
        repeated, budget = 0, self._budget.now
        failed: tuple[TrainPlan, Exception] | None = None
        while True:
            with self._ranks.together(), self._budget.told():  # who refuses must not leave the others waiting
                if failed is not None:
                    budget = self._less(failed[0], budget, repeated, failed[1])
                    failed = None  # with the frames that the error holds
                    gc.collect()  # and the graph, which has cycles
                    give_back()
                plan, passes = self._preparation.plan(inputs, targets, budget)
            self._last = plan
            update = self._update_for(plan)
            self._tighten(plan)
            snapshot = Snapshot(self._inner)
            self.optimizer.zero_grad(set_to_none=True)
            for parameter in self._inner.parameters():
                parameter.grad = None
            written = self._written()
            if self._weights is not None:
                self._weights.begin_step()
            reset_peak()
            guard = self._guard(plan, budget)
            try:
                with self._limited(plan), self._preparation.frozen():
                    if tier == "memory":
                        with update.gradients_in_memory():
                            outcome = passes.run(plan, inputs, targets, before=guard.before)
                    else:
                        outcome = passes.run(plan, inputs, targets, update.begin, before=guard.before)
                guard.end(update.takes(plan.static))
                break
            except BaseException as error:
                if not update.repeatable:
                    raise TrainingError(
                        f"the step failed after some parameters had been stepped (in_backward=True): {error}; "
                        "load the state of an earlier step"
                    ) from error
                update.abandon()
                drain_autograd()
                snapshot.restore()
                if not is_out_of_memory(error) or not isinstance(error, Exception):
                    raise
                repeated, failed = repeated + 1, (plan, error)
        record = StepRecord(
            loss=float(outcome.loss),
            seconds=0.0,
            budget=self._budget.now,
            predicted_peak=plan.predicted_peak,
            measured_peak=0,
            micro_batches=plan.parts,
            replays=outcome.replays,
            spilled=written,
            repeated=repeated,
            departed=outcome.departed,
        )
        return outcome, record, update

    def _less(self, plan: TrainPlan, budget: int, repeated: int, error: Exception) -> int:
        smaller = max(int(min(budget, plan.predicted_peak) * _SMALLER), plan.min_budget)
        if repeated >= _MOST_ATTEMPTS or smaller >= min(budget, plan.predicted_peak):
            raise TrainingError(
                f"the step ran out of memory on the smallest plan as well ({format_bytes(plan.predicted_peak)} "
                f"predicted): {str(error).splitlines()[0]}; the model is as it was before the step"
            ) from error
        self._tell(f"out of memory on a plan of {format_bytes(plan.predicted_peak)}; again in {format_bytes(smaller)}")
        self._budget.lower(smaller)
        return smaller

    def _tighten(self, plan: TrainPlan) -> None:
        """Have the allocator keep what the guard gives back; for a few MiB of activations, have it keep nothing.

        Small tensors are cleared sooner than a heap full of huge pages is given back.
        """
        wanted = MallocPolicy.STRICT if plan.activations < _SMALL_PLAN else MallocPolicy.GUARDED
        if plan.step is None or wanted is self._policy:
            return
        done = open_whole_heap() if wanted is MallocPolicy.GUARDED else set_malloc_policy(wanted)
        self._policy = wanted if done else None

    def _guard(self, plan: TrainPlan, budget: int) -> HeapGuard:
        budget = min(budget, plan.budget)
        heap = NoHeap() if self._policy is MallocPolicy.STRICT else None
        ceiling = budget + _ENFORCED if self._enforce else None
        return HeapGuard(self._footprint.base, budget, ceiling, still=plan.static.still, heap=heap)

    def _limited(self, plan: TrainPlan) -> Any:
        if not self._enforce or any(parameter.is_cuda for parameter in self._inner.parameters()):
            return nullcontext()
        if self._pool is not None:
            self._pool.start()
        static = plan.static
        return data_limit(plan.predicted_peak - static.weights - static.buffers - static.batch + _ENFORCED + STRETCH)

    def _update_for(self, plan: TrainPlan) -> Update | StoredUpdate:
        if self._weights is not None and plan.tier.window and self._weights.budget != plan.tier.window:
            self._weights.budget = plan.tier.window
        if self._update is not None and self._update.tier.name == plan.tier.name:
            return self._update
        if self._update is not None:
            self._update.close()
            self._update = None
        if self._weights is not None and self._weights.stored is not None:
            assert self._folder is not None
            self._update = StoredUpdate(
                self._inner,
                self.optimizer,
                plan.tier,
                self._folder,
                self._weights,
                clip=self._clip,
            )
        else:
            self._update = Update(
                self._inner,
                self.optimizer,
                plan.tier,
                self._folder,
                clip=self._clip,
                scaler=self._scaler,
                in_backward=self._in_backward,
            )
        return self._update

    def _learn(self, peak: int, record: StepRecord) -> None:
        """Kernels that take more beside tensors than was set aside are seen in the first steps; then it is more."""
        slack = peak - max(record.predicted_peak, record.budget)
        if slack <= 0 or self._report.count >= _LEARNING or self._last is None:
            return
        if self._last.min_budget + slack > record.budget:
            return  # no plan would be left; the report tells what was measured
        self._preparation.reserve(slack)
        what = f"{format_bytes(slack)} more set aside for what kernels and the allocator take beside tensors"
        self._tell(what, logging.INFO)

    def _note(self, outcome: Outcome, record: StepRecord, start: float) -> None:
        peak = self._footprint.peak()
        self._learn(peak, record)
        spilled = self._written() - record.spilled
        self._report.add(replace(record, seconds=time.perf_counter() - start, measured_peak=peak, spilled=spilled))

    # -- small things --------------------------------------------------------------------------------------------

    def _send_back(self, loss: torch.Tensor) -> None:
        (self._scaler.scale(loss) if self._scaler is not None else loss).backward()

    def _written(self) -> int:
        update = self._update.bytes_written if self._update is not None else 0
        return update + (self._pool.bytes_written if self._pool is not None else 0)

    def _check_open(self) -> None:
        if self._closed:
            raise TrainingError("this training step was closed; make a new one with train_step")
        if self._pool is not None or self._weights is not None:
            self._home.check()


def train_step(
    model: nn.Module, loss_fn: Callable[..., Any] | None, optimizer: torch.optim.Optimizer, **options: Any
) -> TrainStep:
    """A training step inside a byte budget, with the gradients of the plain step.

    ``loss = step(inputs, targets)`` replaces forward, backward, ``optimizer.step()`` and ``zero_grad()``.

    Args:
        model: any eager module; also wrapped in ``DistributedDataParallel``.
        loss_fn: gives a scalar (or a pair of sum and count) of the model's output and the targets; None where the
            model returns its loss, as Hugging Face's do.
        optimizer: any of torch's over the model's parameters, but those that need a closure.
        budget: bytes for everything that training holds: weights, buffers, gradients, optimizer state, batch,
            activations, temporaries, and what the allocator adds. An int, "1.5GiB", or "auto" (what the machine can
            spare).
        spill: a folder for activations (and what else does not fit); None for no storage.
        weights: the weights file or folder of a model that is larger than memory: a skeleton on meta, or a model from
            ``nb.stream`` (which knows its own). Frozen weights take turns in a window, in forward and in backward.
            Weights on meta that are trained are kept in ``spill``, with their gradients and the optimizer's state.
        batch_norm: "auto" and "never": a batch with BatchNorm in train mode is not split; "lockstep": split, and
            exact; "ghost": each micro-batch has its own statistics, as in plain accumulation (not exact); "frozen":
            BatchNorm in eval mode.
        techniques: which of ``Switches.NAMES`` may be used; None for all but "fuse" and "low_memory", which round
            otherwise.
        micro_batches: their number, where it must not be chosen.
        clip_grad_norm: largest 2-norm of all gradients.
        scaler: a ``torch.amp.GradScaler``.
        in_backward: step each bucket of parameters as soon as its gradients are complete, so that gradients are
            never all in memory (with clipping they have to wait for the norm). A step that fails midway can then
            not be repeated.
        count: of a micro-batch's inputs and targets: what the loss averages over.
        resume: go on from the last whole step in ``spill``, where weights on meta are trained; ``steps_done`` tells
            which. What is in memory is resumed by ``load_state_dict`` of model and optimizer.
        adapt: follow what the machine has free, below the budget.
        enforce: refuse allocations that go far beyond the plan, so that an overrun is an error that is caught and
            not a kill (CPU).

    Raises:
        UsageError: an option that cannot be used as given; ``resume`` where there is nothing to go on from.
        SpillError: the folder cannot be used; what is to be resumed is damaged, or not of one step of one run.
        TrainingError: an optimizer that cannot be used, or whose parameters are not the model's.
    """
    check_names(TrainStep.__init__, options)
    return TrainStep(model, loss_fn, optimizer, **options)
