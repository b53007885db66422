"""How the losses of micro-batches add up to the loss of the batch.

The mean over a batch is not the mean of its micro-batches' means: each counts by what it averages over. That is
samples for most losses, and for cross entropy the targets that are not ignored, or the sum of their class weights. A
:class:`LossPlan` says which, and gives each micro-batch its weight, so that the weighted losses (and gradients) of the
parts sum to those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowboat.errors import LossError
from narrowboat.train.micro_batch import batch_size, cut, part_sizes, tensors_in

Rule = Literal["samples", "targets", "count", "pair", "sum"]
Count = Callable[[Any, Any], "Tensor | float"]


class MicroBatch(NamedTuple):
    """One part of a batch and the factor its loss is multiplied with."""

    inputs: Any
    targets: Any
    weight: float


@dataclass(frozen=True)
class LossPlan:
    """Which counts weigh the micro-batches.

    Attributes:
        rule: ``"samples"``: the loss is a mean over samples. ``"targets"``: over targets that are not ignored (or
            their class weights). ``"count"``: over what the user's function counts. ``"sum"``: it is a sum, each
            weight is 1. ``"pair"``: the loss function returns a sum and what it is to be divided by; see
            :meth:`correction`.
        why: how the rule was found, in words.
        count: what a micro-batch counts, from its inputs and targets; unused by ``"sum"`` and ``"pair"``.
    """

    rule: Rule
    why: str
    count: Count = lambda inputs, targets: batch_size(inputs, targets)

    def weights(self, pieces: Sequence[tuple[Any, Any]]) -> list[float]:
        """One factor per piece of a batch; they sum to 1 unless the rule is ``"sum"`` (each 1).

        Under ``"pair"`` the counts come with the losses, so these are preliminary: by samples.
        """
        if self.rule == "sum":
            return [1.0] * len(pieces)
        if self.rule == "pair":
            return [1.0 / sum(batch_size(*piece) for piece in pieces)] * len(pieces)
        counts = [float(self.count(*piece)) for piece in pieces]
        total = sum(counts)
        # A batch without a single target: plain torch gives NaN, and so does any weighting.
        return [count / total for count in counts] if total else [1.0 / len(counts)] * len(counts)

    def weighted(self, result: Any, weight: float) -> tuple[Tensor, Tensor | float]:
        """What a micro-batch adds to the loss, attached, and its count under ``"pair"`` (else 0).

        Args:
            result: what the loss function returned.
            weight: the micro-batch's, from :meth:`weights`.

        Raises:
            LossError: the result is not a real scalar (or, under ``"pair"``, no sum with a count).
        """
        count: Tensor | float = 0.0
        if self.rule == "pair":
            if not is_pair(result):
                raise LossError("the loss function returned (sum, count) before and does not now")
            result, count = result
        if not isinstance(result, Tensor) or result.numel() != 1:
            told = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise LossError(f"the loss has to be a scalar tensor (or a pair of sum and count), but it is {told}")
        if result.is_complex():
            raise LossError(f"the loss is complex ({result.dtype}): give a real number, such as its abs()")
        loss = result.reshape(())
        if weight == 0.0:
            # The mean over nothing is NaN; what it adds is nothing.
            return torch.nan_to_num(loss, nan=0.0) * 0.0, count
        return loss * weight, count

    def correction(self, samples: int, counts: Sequence[Tensor | float]) -> float:
        """The factor that gradients (and loss) of a whole step are still to be multiplied with; 1 but for ``"pair"``.

        Args:
            samples: in the whole batch.
            counts: what :meth:`weighted` returned for each micro-batch.
        """
        return samples / sum(map(float, counts)) if self.rule == "pair" else 1.0


def split_batch(inputs: Any, targets: Any, parts: int, plan: LossPlan | None = None) -> list[MicroBatch]:
    """Cut a batch into at most ``parts`` micro-batches whose sizes differ by one at most.

    Args:
        inputs: tensors in nested tuples, lists and mappings, samples along dimension 0.
        targets: the same, or None where the inputs hold them.
        parts: how many; fewer where there are fewer samples.
        plan: what the weights count; samples without one.

    Returns:
        Views into the batch. Tensors without a row per sample, and what is no tensor, go whole into each part.

    Raises:
        TrainingError: inputs and targets have different numbers of samples.
    """
    plan = plan or LossPlan("samples", "nothing else was asked for")
    pieces = cut(inputs, targets, part_sizes(batch_size(inputs, targets), parts))
    return [MicroBatch(*piece, weight) for piece, weight in zip(pieces, plan.weights(pieces), strict=True)]


def call_loss(model: nn.Module, loss_fn: Callable[..., Any] | None, inputs: Any, targets: Any) -> Any:
    """Forward pass and loss: a tuple of inputs is positional arguments, a mapping keyword arguments.

    Without ``loss_fn`` the model computes the loss itself, as Hugging Face's do from ``labels`` (``targets``, where
    given, become that argument); it is ``output.loss``, or the output where that is a tensor.
    """
    if isinstance(inputs, Mapping):
        labels = {"labels": targets} if loss_fn is None and targets is not None else {}
        output = model(**inputs, **labels)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    if loss_fn is not None:
        return loss_fn(output, targets)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if loss is None:
        raise LossError("the model returned no loss: give it labels, or give a loss function")
    return loss


@dataclass(frozen=True)
class TargetCount:
    """Counts the targets that cross entropy averages over: those not ignored, each as its class weighs.

    Attributes:
        leaf: which tensor of ``(inputs, targets)`` holds them, in order.
        ignore_index: the target that does not count.
        weight: per class, or None.
        shifted: the first target of each row is not used, as in next-token prediction.
    """

    leaf: int
    ignore_index: int = -100
    weight: Tensor | None = None
    shifted: bool = False

    def __call__(self, inputs: Any, targets: Any) -> Tensor:
        target = tensors_in((inputs, targets))[self.leaf]
        used = target[..., 1:] if self.shifted else target
        kept = used != self.ignore_index
        if self.weight is None:
            return kept.sum()
        return self.weight.to(used.device, torch.float64)[used[kept]].sum()


def plan_of_function(loss_fn: Any, inputs: Any, targets: Any) -> LossPlan | None:
    """The rule for a loss that tells it by itself: torch's modules and functions, with ``functools.partial`` too.

    None for anything else (a lambda, a module of the user's, a loss inside the model): see
    :func:`narrowboat.train.loss_trace.plan_loss`.

    Raises:
        LossError: the loss is not reduced to a scalar.
    """
    options = _options(loss_fn)
    if options is None:
        return None
    name, reduction = options["name"], options.get("reduction", "mean")
    if reduction == "none":
        raise LossError(f"{name} with reduction='none' returns a loss per sample; use 'mean' or 'sum'")
    if reduction == "sum":
        return LossPlan("sum", f"{name} sums")
    if not options["cross_entropy"]:
        return LossPlan("samples", f"{name} is a mean over equal samples")
    if len(tensors_in(targets)) != 1:
        return None
    found = tensors_in((inputs, targets))
    ignore_index, weight = options.get("ignore_index", -100), options.get("weight")
    if found[-1].is_floating_point():
        return LossPlan("samples", f"{name} with probabilities for targets is a mean over all of them")
    averaged = "" if weight is None else ", as their classes weigh"
    return LossPlan(
        "targets",
        f"{name} is a mean over the targets that are not {ignore_index}{averaged}",
        TargetCount(len(found) - 1, ignore_index, weight),
    )


def is_pair(result: Any) -> bool:
    """Whether a loss function returned ``(sum, count)``."""
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        return False
    loss, count = result
    scalar = isinstance(count, (int, float)) or (isinstance(count, Tensor) and count.numel() == 1)
    return isinstance(loss, Tensor) and loss.numel() == 1 and scalar


def _options(loss_fn: Any) -> dict[str, Any] | None:
    """Name, reduction, ignore_index and weight of one of torch's own losses; None for others."""
    if isinstance(loss_fn, nn.modules.loss._Loss) and type(loss_fn).__module__ == nn.modules.loss.__name__:
        cross = isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss))
        attributes = {n: getattr(loss_fn, n) for n in ("reduction", "ignore_index", "weight") if hasattr(loss_fn, n)}
        return {"name": type(loss_fn).__name__, "cross_entropy": cross, **attributes}
    keywords: dict[str, Any] = {}
    while isinstance(loss_fn, partial):
        if loss_fn.args:
            return None
        keywords = {**loss_fn.keywords, **keywords}
        loss_fn = loss_fn.func
    name = getattr(loss_fn, "__name__", "")
    if not name or getattr(F, name, None) is not loss_fn or "size_average" in keywords or "reduce" in keywords:
        return None
    return {"name": name, "cross_entropy": loss_fn in (F.cross_entropy, F.nll_loss), **keywords}
