"""One step of several processes: who counts how much, and all of them or none.

``DistributedDataParallel`` averages the gradients of its ranks. The gradient of the whole batch weighs each rank by
what its loss averages over (samples, targets that are not ignored), so each rank's loss is multiplied by
``its count * ranks / count of all`` beforehand; that takes one number from each.

A rank that cannot go on would leave the others waiting in a collective for ever. So the ranks tell each other how they
fare before each point of no return: when plans are made, and before the backward pass that synchronises gradients.
An error inside that last backward pass is not told: the others wait for it until their process group's timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from narrowboat.errors import BudgetError, LossError, TrainingError
from narrowboat.machine.data_limit import is_out_of_memory
from narrowboat.train.loss import LossPlan
from narrowboat.train.micro_batch import batch_size

Result = TypeVar("Result")
_FINE, _NO_MEMORY, _FAILED = 0, 1, 2


class Ranks:
    """The processes that share a ``DistributedDataParallel``; alone, with any other module.

    Attributes:
        model: the module itself.
        world: how many they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._replicas = model if isinstance(model, DistributedDataParallel) else None
        self._group = self._replicas.process_group if self._replicas is not None else None
        self.model: nn.Module = self._replicas.module if self._replicas is not None else model
        self.world: int = dist.get_world_size(self._group) if self._replicas is not None else 1

    def factor(self, plan: LossPlan, inputs: Any, targets: Any) -> float:
        """What this rank's loss is multiplied with, so that the ranks' average is that of the whole batch.

        Under ``"pair"`` the counts are not known yet; samples stand for them until the counts are :meth:`summed`.
        """
        if self.world == 1:
            return 1.0
        if plan.rule == "sum":
            return float(self.world)
        with self.together():
            count = float(batch_size(inputs, targets) if plan.rule == "pair" else plan.count(inputs, targets))
        (total,) = self.summed([count])
        # Not one target in the whole batch: NaN, as in the plain step.
        return count * self.world / total if total else 1.0

    def summed(self, values: Sequence[Any]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        own = [float(value) for value in values]
        if self.world == 1:
            return own
        numbers = torch.tensor(own, dtype=torch.float64, device=self._device())
        dist.all_reduce(numbers, group=self._group)
        return numbers.tolist()

    def begin(self) -> None:
        """A step begins: buffers are the first rank's, as ``DistributedDataParallel`` has it before a forward pass."""
        if self._replicas is not None and self.world > 1:
            self._replicas.require_forward_param_sync = True
            if self._replicas.will_sync_module_buffers():
                self._replicas._sync_buffers()

    def forward(self, call: Callable[[], Result], *, synchronise: bool) -> Result:
        """Run a forward pass and its loss.

        The call goes through ``DistributedDataParallel`` only where its backward pass synchronises gradients, and as a
        whole: what that does around the model (collectives, buckets) is no part of the pass that was planned.

        Args:
            call: gives the loss, or a tuple that holds it.
            synchronise: gradients of this and of all passes since the last synchronisation.
        """
        replicas = self._replicas
        if replicas is None or self.world == 1 or not synchronise:
            return call()
        replicas.require_forward_param_sync = False  # see begin
        replicas.module = _Call(call)
        try:
            return replicas()
        finally:
            replicas.module = self.model

    def together(self) -> Together:
        """A block that all ranks get through, or none does."""
        return Together(self)

    def tell(self, error: BaseException | None) -> None:
        """Tell the others how this rank fares, and hear of them; returns where this one has the worst news.

        Raises:
            BudgetError, LossError, TrainingError: another rank cannot go on.
            MemoryError: another rank has no memory for its plan, and may have for a smaller one.
        """
        if self.world == 1:
            return
        own = _FINE if error is None else _NO_MEMORY if is_out_of_memory(error) else _FAILED
        worst = torch.tensor([own], dtype=torch.int64, device=self._device())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._group)
        if int(worst) == _FINE:
            return
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, _described(own, error), group=self._group)
        if own < int(worst):
            raise _error_of(told, int(worst)) from error

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


class _Call(nn.Module):
    """A function in the place of the module that is replicated."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self._call = call

    def forward(self) -> Any:
        return self._call()


class Together:
    """A block whose errors are told to the other ranks, up to where :meth:`agree` is called or to its end."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._agreed = False

    def __enter__(self) -> Together:
        return self

    def agree(self) -> None:
        """All ranks have come as far as this. Raises where one has not; see :meth:`Ranks.tell`."""
        self._agreed = True
        self._ranks.tell(None)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._agreed:
            self._agreed = True
            self._ranks.tell(error)


def _described(state: int, error: BaseException | None) -> dict[str, Any]:
    return {
        "state": state,
        "kind": type(error).__name__,
        "message": str(error),
        "minimum": getattr(error, "minimum", 0),
        "limiter": getattr(error, "limiter", ""),
    }


def _error_of(told: list[dict[str, Any]], worst: int) -> Exception:
    """What the worst news of another rank is on this one."""
    rank, news = next((rank, news) for rank, news in enumerate(told) if news["state"] == worst)
    if worst == _NO_MEMORY:
        return MemoryError(f"rank {rank} ran out of memory: {news['message']}")
    message = f"rank {rank} does not make this step, so no rank does: {news['message']}"
    if news["kind"] == BudgetError.__name__:
        return BudgetError(message, minimum=news["minimum"], limiter=news["limiter"])
    if news["kind"] == LossError.__name__:
        return LossError(message)
    return TrainingError(f"{message} ({news['kind']})")
