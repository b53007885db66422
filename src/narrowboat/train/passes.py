"""Forward and backward of one batch under a plan: micro-batch by micro-batch, each on its own tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from narrowboat.errors import LossError
from narrowboat.train.distributed import Ranks, Together
from narrowboat.train.lockstep import run_in_lockstep
from narrowboat.train.loss import LossPlan, MicroBatch, call_loss, is_pair, split_batch
from narrowboat.train.low_memory import LowMemoryLoss
from narrowboat.train.micro_batch import batch_size
from narrowboat.train.plan import TrainPlan
from narrowboat.train.tape.cells import Pool
from narrowboat.train.tape.frames import Takes
from narrowboat.train.tape.run import TapeRun, without_autocast

Backward = Callable[[torch.Tensor], None]
Begin = Callable[[bool], None]


@dataclass(slots=True)
class Outcome:
    """What the passes over a batch gave.

    Attributes:
        loss: of the whole batch, detached.
        replays: stretches computed again.
        departed: where a pass left the plan; "" if none did.
    """

    loss: torch.Tensor
    replays: int = 0
    departed: str = ""

    def take(self, run: TapeRun) -> None:
        """Add what a finished tape tells, and close it."""
        self.replays += run.replays
        if run.departed is not None:
            at, name, expected = run.departed
            self.departed = f"operator {at} ({name} instead of {expected})"
        run.close()


def drain_autograd() -> None:
    """After a backward pass that failed: the engine keeps what was queued until the next one begins."""
    torch.zeros(1, requires_grad=True).sum().backward()


@dataclass(slots=True)
class Passes:
    """Runs forward and backward.

    Attributes:
        model: as it was given; a ``DistributedDataParallel`` synchronises with the last micro-batch only.
        loss_fn: of output and targets; None where the model returns its loss.
        loss_plan: how losses of micro-batches are weighted.
        pool: for activations on storage.
        backward: how a loss is sent backwards (a gradient scaler's business).
        check_finite: refuse a loss that is not finite before its backward.
        lockstep: micro-batches meet at each BatchNorm, and there is one backward pass for all.
        low_memory: computes the loss without logits; None where model and loss are called as they are.
        ranks: the processes that make the step together.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    loss_plan: LossPlan
    pool: Pool | None
    backward: Backward
    check_finite: bool = True
    lockstep: bool = False
    low_memory: LowMemoryLoss | None = None
    ranks: Ranks = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = Ranks(self.model)

    def run(
        self,
        plan: TrainPlan,
        inputs: Any,
        targets: Any,
        begin: Begin = lambda last: None,
        *,
        before: Callable[[Takes], None] | None = None,
    ) -> Outcome:
        """Leave the gradients of the batch in ``.grad`` (or where hooks put them).

        Args:
            begin: called before each backward pass, with whether it is the last.
            before: told what is about to be taken, before each operator.

        Raises:
            LossError: the loss is not a scalar, has no graph, or is not finite.
        """
        factor = self.ranks.factor(self.loss_plan, inputs, targets)
        outcome = Outcome(torch.zeros(()))
        self.ranks.begin()
        with self.ranks.together() as together:
            pieces = [
                piece._replace(weight=piece.weight * factor)
                for piece in split_batch(inputs, targets, plan.parts, self.loss_plan)
            ]
            runs = [TapeRun(plan.step, self.pool, before=before) if plan.step is not None else None for _ in pieces]
            way = self._in_lockstep if self.lockstep and len(pieces) > 1 else self._in_turn
            try:
                losses, counts = way(pieces, runs, begin, together)
            except BaseException:
                for run in runs:
                    if run is not None:
                        run.close()
                raise
        for run in runs:
            if run is not None:
                outcome.take(run)
        outcome.loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self._correct(outcome, counts, inputs, targets)
        return outcome

    def _in_turn(
        self, pieces: Sequence[MicroBatch], runs: Sequence[TapeRun | None], begin: Begin, together: Together
    ) -> tuple[list[torch.Tensor], list[Any]]:
        """Forward and backward of one micro-batch after the other."""
        losses, counts = [], []
        for number, (piece, run) in enumerate(zip(pieces, runs, strict=True)):
            last = number == len(pieces) - 1
            forward = partial(self._forward, piece, run, together if last else None, whole=len(pieces) == 1)
            loss, count = self.ranks.forward(forward, synchronise=last)
            begin(last)
            with without_autocast():
                self.backward(loss)
            losses.append(loss.detach())
            counts.append(count)
            del loss
            if run is not None:
                run.close()
        return losses, counts

    def _forward(
        self, piece: MicroBatch, run: TapeRun | None, together: Together | None, *, whole: bool
    ) -> tuple[torch.Tensor, Any]:
        with run.forward() if run is not None else nullcontext():
            loss, count = self.loss(*piece, whole=whole)
        self._check(loss)
        if together is not None:
            together.agree()  # the backward pass that follows meets those of the other ranks
        return loss, count

    def _in_lockstep(
        self, pieces: Sequence[MicroBatch], runs: Sequence[TapeRun | None], begin: Begin, together: Together
    ) -> tuple[list[torch.Tensor], list[Any]]:
        """Forward of all micro-batches, which meet at each BatchNorm, and one backward."""
        counts: list[Any] = [0.0] * len(pieces)

        def call(part: int) -> torch.Tensor:
            loss, counts[part] = self.loss(*pieces[part], whole=False)
            return loss

        def entered(part: int) -> AbstractContextManager[Any]:
            run = runs[part]
            return run.forward() if run is not None else nullcontext()

        def forward() -> torch.Tensor:
            calls = [partial(call, part) for part in range(len(pieces))]
            losses.extend(run_in_lockstep(self.ranks.model, calls, entered))
            for loss in losses:
                self._check(loss)
            together.agree()
            return torch.stack(losses).sum()

        losses: list[torch.Tensor] = []
        total = self.ranks.forward(forward, synchronise=True)
        losses = [loss.detach() for loss in losses]
        begin(True)
        with without_autocast():
            self.backward(total)
        return losses, counts

    def loss(self, inputs: Any, targets: Any, weight: float = 1.0, *, whole: bool = True) -> tuple[torch.Tensor, Any]:
        """The weighted loss of a micro-batch, attached, and its count; ``whole``: it is the batch."""
        # Copies that autocast made of weights belong to one graph each.
        torch.clear_autocast_cache()
        if self.low_memory is not None:
            result = self.low_memory(inputs, targets)
        else:
            result = call_loss(self.ranks.model, self.loss_fn, inputs, targets)
        if whole and self.loss_plan.rule == "pair" and self.ranks.world == 1 and is_pair(result):
            made: tuple[torch.Tensor, Any] = result[0] / result[1], 0.0  # as the plain step would
        else:
            made = self.loss_plan.weighted(result, weight)
        torch.clear_autocast_cache()
        if not made[0].requires_grad:
            raise LossError(
                "the loss has no graph: no parameter that requires a gradient took part (was the step called under "
                "torch.no_grad, or is everything frozen?)"
            )
        return made

    def _check(self, loss: torch.Tensor) -> None:
        if self.check_finite and not bool(torch.isfinite(loss)):
            raise LossError(
                f"the loss is {float(loss.detach()):g}; nothing was changed. Lower the learning rate, clip gradients "
                "(clip_grad_norm=), or look at this batch"
            )

    def _correct(self, outcome: Outcome, counts: list[Any], inputs: Any, targets: Any) -> None:
        pairs = self.loss_plan.rule == "pair" and (len(counts) > 1 or self.ranks.world > 1)
        if not pairs and self.ranks.world == 1:
            return
        samples, total, loss = self.ranks.summed([batch_size(inputs, targets), sum(map(float, counts)), outcome.loss])
        factor = self.loss_plan.correction(int(samples), [total]) if pairs else 1.0
        if self.ranks.world > 1:
            outcome.loss = outcome.loss.new_tensor(loss / self.ranks.world)
        outcome.loss = outcome.loss * factor
        for parameter in self.model.parameters() if pairs else ():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
