"""``train_step``: forward, backward and optimizer of one batch inside a number of bytes.

The first call with a kind of batch measures it, checks the loss and whether it may be split, and plans
(``preparation``). Every call runs the plan that the budget in force allows (``passes``), steps the optimizer where its
state is (``update``), and records prediction beside measurement (``report``). A step that runs out of memory is given
up before the optimizer has seen anything, everything it changed is put back, and it is done again on a smaller plan.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import nn

from narrowboat.arena.device.interface import Device
from narrowboat.checkpoint import WeightsIndex
from narrowboat.errors import TrainingError, UsageError
from narrowboat.machine.data_limit import is_out_of_memory
from narrowboat.quantities import format_bytes
from narrowboat.train.budget import BudgetInForce
from narrowboat.train.device.choice import Amounts, check_batch, check_weights, device_of
from narrowboat.train.device.memory import memory_of
from narrowboat.train.device.offload import open_pool
from narrowboat.train.device.spill import DeviceSpillPool
from narrowboat.train.distributed import Ranks
from narrowboat.train.forked import Home
from narrowboat.train.fuse import Fusion
from narrowboat.train.host_memory import HostMemory
from narrowboat.train.measure.chain import Rates
from narrowboat.train.memory import MeasuredMemory
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
from narrowboat.train.stored_update import StoredUpdate, update_for
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
        budget: int | str | Mapping[str, int | str] = "auto",
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
        device: str | torch.device | Device | None = None,
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
        self._scaler = scaler
        self._how: dict[str, Any] = {"clip": clip_grad_norm, "scaler": scaler, "in_backward": in_backward}
        check_optimizer(self._inner, optimizer)
        switches = Switches.of(techniques)
        self._device = device_of(self._inner, device)
        amounts = Amounts.of(budget, self._device)
        on_device = None
        if self._device is not None:
            check_weights(self._inner, weights)
            on_device = memory_of(self._device, self._inner, optimizer, enforce=enforce)
        self._budget = BudgetInForce(amounts.own, adapt=adapt, machine=on_device)
        self._folder = folder_of(spill)
        self._fusion = Fusion(self._inner) if switches.fuse else None
        self._pool: SpillPool | DeviceSpillPool | None = None
        rates, no_host = Rates(), ""
        if self._folder is not None and (switches.planner.spill or on_device is None):
            storage = self._pool = SpillPool(self._folder, in_flight=_IN_FLIGHT)
            write, read = measure_bandwidth(self._folder)
            rates = Rates(write=1 / write, read=1 / read)
        if self._device is not None and switches.planner.spill:
            behind = storage if self._folder is not None else None
            self._pool, rates, no_host = open_pool(self._device, amounts, self._budget.now, behind, rates)
        self._weights: TrainingWeights | None = None
        try:
            self._weights = weights_on_storage(
                self._inner, weights, self._budget.now, store=self._folder, resume=resume
            )
        except BaseException:
            if self._pool is not None:
                self._pool.close()
            raise
        self._memory: MeasuredMemory = on_device or HostMemory(
            self._inner, optimizer, self._weights, enforce=enforce, start_threads=self._start_threads
        )
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
            in_flight=self._pool.holds_most if self._pool is not None else 0,
            memory=self._memory,
            no_host=no_host,
            weights=self._weights,
            count=count,
            micro_batches=micro_batches,
            scaled=scaler is not None,
            step_in_backward=in_backward and clip_grad_norm is None,
            fusion=self._fusion,
            tell=self._tell,
        )
        self._last: TrainPlan | None = None
        self._update: Update | StoredUpdate | None = None
        self._report = Report()
        self._steps_done = self._weights.steps_done if self._weights is not None else 0
        self._home = Home()
        self._closed = self._given_up = False

    # -- for the user --------------------------------------------------------------------------------------------

    @property
    def budget(self) -> int:
        """Bytes in force, of the device that computes; may be set between steps (an int or "1.5GiB")."""
        return self._budget.now

    @budget.setter
    def budget(self, value: int | str | Mapping[str, int | str]) -> None:
        amounts = Amounts.of(value, self._device)
        if amounts.host is not None:
            raise UsageError("how much host memory may be pinned is settled when the step is made: leave 'cpu' out")
        self._budget.set(amounts.own)

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
        check_batch(inputs, targets, self._inner)
        inputs = self._preparation.divided(inputs, targets)
        self._memory.begin(inputs, targets)
        self._budget.follow(self._memory.could_hold)
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
        start = self._memory.clock.mark()
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
        start = self._memory.clock.mark()
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
        self._memory.close()
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
            check_batch(inputs, targets, self._inner)
            inputs = self._preparation.divided(inputs, targets)
        if self._given_up:
            self._given_up = False
            gc.collect()  # what the last step's error holds is in cycles
        self._memory.begin(inputs, targets)
        if change := self._budget.follow(self._memory.could_hold):
            self._tell(change, logging.INFO)
        repeated, budget = 0, self._budget.now
        failed: tuple[TrainPlan, Exception] | None = None
        while True:
            with self._ranks.together(), self._budget.told():  # who refuses must not leave the others waiting
                if failed is not None:
                    budget = self._less(failed[0], budget, repeated, failed[1])
                    failed = None  # with the frames that the error holds
                    gc.collect()  # and the graph, which has cycles
                    if self._pool is not None:
                        self._pool.rest()
                    self._memory.give_back()
                plan, passes = self._preparation.plan(inputs, targets, budget)
            self._last = plan
            update = self._update_for(plan)
            snapshot = Snapshot(self._inner)
            self.optimizer.zero_grad(set_to_none=True)
            for parameter in self._inner.parameters():
                parameter.grad = None
            written, offloaded = self._written(), self._offloaded()
            if self._weights is not None:
                self._weights.begin_step()
            if self._pool is not None:
                self._pool.expect(plan.at_once)
            self._memory.reset_peak()
            try:
                with self._memory.guarded(plan, budget) as guard, self._preparation.frozen():
                    before = guard.before if guard.watches else None
                    if tier == "memory":
                        with update.gradients_in_memory():
                            outcome = passes.run(plan, inputs, targets, before=before)
                    else:
                        outcome = passes.run(plan, inputs, targets, update.begin, before=before)
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
                self._given_up = True
                if not is_out_of_memory(error) or not isinstance(error, Exception):
                    raise
                repeated, failed = repeated + 1, (plan, error)
        record = StepRecord(
            loss=0.0,
            seconds=0.0,
            budget=self._budget.now,
            predicted_peak=plan.predicted_peak,
            measured_peak=0,
            micro_batches=plan.parts,
            replays=outcome.replays,
            spilled=written,
            offloaded=offloaded,
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

    def _update_for(self, plan: TrainPlan) -> Update | StoredUpdate:
        if self._weights is not None and plan.tier.window and self._weights.budget != plan.tier.window:
            self._weights.budget = plan.tier.window
        if self._update is not None and self._update.tier.name == plan.tier.name:
            return self._update
        if self._update is not None:
            self._update.close()
            self._update = None
        model, optimizer, weights = self._inner, self.optimizer, self._weights
        self._update = update_for(model, optimizer, plan.tier, self._folder, weights, **self._how)
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

    def _note(self, outcome: Outcome, record: StepRecord, start: Any) -> None:
        clock, peak = self._memory.clock, self._memory.peak()
        self._learn(peak, record)
        record = replace(
            record,
            seconds=clock.seconds(start, clock.mark()),  # on a device the step's one wait for it, so its loss is there
            loss=float(outcome.loss),
            measured_peak=peak,
            reserved_peak=self._memory.reserved_peak(),
            spilled=self._written() - record.spilled,
            offloaded=self._offloaded() - record.offloaded,
        )
        self._report.add(record)

    # -- small things --------------------------------------------------------------------------------------------

    def _send_back(self, loss: torch.Tensor) -> None:
        (self._scaler.scale(loss) if self._scaler is not None else loss).backward()

    def _written(self) -> int:
        update = self._update.bytes_written if self._update is not None else 0
        return update + (self._pool.bytes_written if self._pool is not None else 0)

    def _offloaded(self) -> int:
        return self._pool.bytes_offloaded if self._pool is not None else 0

    def _start_threads(self) -> None:
        if self._pool is not None:
            self._pool.start()

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

    Keyword Args:
        budget: bytes for everything that training holds: weights, buffers, gradients, optimizer state, batch,
            activations, temporaries, and what the allocator adds. An int, "1.5GiB", or "auto" (what the machine can
            spare); of the device where the model is. For a model on a GPU also ``{"cuda": "6GiB", "cpu": "8GiB"}``:
            "cpu" is how much host memory may be pinned for activations; left out, half of what the host can spare.
        spill: a folder for activations (and what else does not fit); None for no storage.
        weights: the weights file or folder of a model that is larger than memory: a skeleton on meta, or a model from
            ``nb.stream`` (which knows its own). Frozen weights take turns in a window, in forward and in backward.
            Weights on meta that are trained are kept in ``spill``, with their gradients and the optimizer's state.
        batch_norm: "auto" and "never": a batch with BatchNorm in train mode is not split; "lockstep": split, and
            exact; "ghost": each micro-batch has its own statistics, as in plain accumulation (not exact); "frozen":
            BatchNorm in eval mode.
        techniques: which of ``Switches.NAMES`` may be used; None: all but "fuse" and "low_memory", which round anew.
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
            not a kill. On a GPU torch's allocator is held to the budget while the passes run
            (``set_per_process_memory_fraction``, put back afterwards).
        device: where the model is; None to go by its parameters.

    Raises:
        NoDeviceError: there is no such device.
        DeviceMemoryError: the budget is above what the device has free.
        PinnedMemoryError: the system does not pin what the budget has for "cpu".
        UsageError: an option that cannot be used as given; ``resume`` where there is nothing to go on from.
        SpillError: the folder cannot be used; what is to be resumed is damaged, or not of one step of one run.
        TrainingError: an optimizer that cannot be used, or whose parameters are not the model's.
    """
    check_names(TrainStep.__init__, options)
    return TrainStep(model, loss_fn, optimizer, **options)
