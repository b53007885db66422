"""Finding out what a loss averages over by watching it once, on a few samples of the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from narrowboat.train.failures import failures_named
from narrowboat.train.loss import Count, LossPlan, TargetCount, call_loss, is_pair, plan_of_function
from narrowboat.train.micro_batch import batch_size, copied, has_rows, mapped, rows, tensors_in
from narrowboat.train.undisturbed import undisturbed

Call = Callable[[nn.Module, Any, Any, Any], Any]


def plan_loss(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    inputs: Any,
    targets: Any,
    *,
    count: Count | None = None,
    call: Call = call_loss,
) -> LossPlan:
    """Find the rule by which micro-batches of such batches are weighted.

    In this order: ``count``; what torch's own losses say of themselves; else one forward pass over up to four samples
    is watched, which finds losses that return ``(sum, count)`` and the targets of a cross entropy called inside a
    function of the user's or inside the model (shifted by one or not). What is left is a mean over samples. It is a
    guess: :func:`narrowboat.train.split_check.check_splits` tells whether it is right.

    Args:
        model: left as it is: buffers, modes and random numbers.
        loss_fn: of the model's output and ``targets``; None where the model returns its loss.
        inputs, targets: a batch, on the model's device.
        count: counts what the loss averages over in a micro-batch's inputs and targets.
        call: runs model and loss.

    Raises:
        LossError: the loss is no scalar.
        TrainingError: model or loss fail on these samples.
    """
    if count is not None:
        return LossPlan("count", "the count is given", count)
    plan = plan_of_function(loss_fn, inputs, targets)
    if plan is not None:
        return plan
    samples = batch_size(inputs, targets)
    few_inputs, few_targets = (copied(rows(tree, samples, 0, min(samples, 4))) for tree in (inputs, targets))
    with undisturbed(model), torch.no_grad():
        few = min(samples, 4)
        # The first pass of model and loss together: what goes wrong may be theirs.
        with failures_named(f"tried on {few} of its {samples} samples" if few < samples else ""):
            result, seen = _watched(call, model, loss_fn, few_inputs, few_targets)
        if is_pair(result):
            plan = LossPlan("pair", "the loss function returns a sum and its count")
            plan.weighted(result, 1.0)
            return plan
        LossPlan("samples", "").weighted(result, 1.0)  # refuses what is no scalar
        if len(seen) != 1:
            return LossPlan("samples", "taken for a mean over samples")
        (entropy,) = seen
        if entropy.reduction == "sum":
            return LossPlan("sum", "cross entropy is summed")
        if entropy.target.is_floating_point():
            return LossPlan("samples", "cross entropy with probabilities for targets is a mean over all of them")
        # Ignored targets hide whether a row is shifted, so a second look is taken with none ignored.
        few_inputs, few_targets = (_filled(tree, entropy.ignore_index) for tree in (few_inputs, few_targets))
        _, seen = _watched(call, model, loss_fn, few_inputs, few_targets)
        found = _find_targets(seen[0], few_inputs, few_targets) if len(seen) == 1 else None
    if found is None:
        return LossPlan("samples", "cross entropy of targets that are not in the batch as they are: taken for a mean")
    shifted = ", shifted by one" if found.shifted else ""
    return LossPlan("targets", f"cross entropy is a mean over the targets that are not ignored{shifted}", found)


@dataclass(frozen=True)
class _Seen:
    target: Tensor
    ignore_index: int
    weight: Tensor | None
    reduction: str


class _Watch(TorchFunctionMode):
    """Notes every call of cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Seen] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.cross_entropy, F.nll_loss):
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            target, ignored, weight, reduction = (
                given.arguments[name] for name in ("target", "ignore_index", "weight", "reduction")
            )
            self.seen.append(_Seen(target, ignored, weight, reduction))
        return func(*args, **(kwargs or {}))


def _watched(call: Call, model: nn.Module, loss_fn: Any, inputs: Any, targets: Any) -> tuple[Any, list[_Seen]]:
    given = copied((inputs, targets))
    for differentiates in (False, True):  # inside, as a gradient penalty does
        try:
            with _Watch() as watch, torch.set_grad_enabled(differentiates):
                result = call(model, loss_fn, *given)
            break
        except RuntimeError as error:
            if differentiates or "does not require grad" not in str(error):
                raise
            given = inputs, targets
    return result, watch.seen


def _filled(tree: Any, ignore_index: int) -> Any:
    """Ignored targets replaced by class 0, which every classifier has. A negative number marks targets safely."""
    if ignore_index >= 0:
        return tree
    return mapped(
        lambda t: t if t.is_floating_point() or t.is_complex() else t.masked_fill(t == ignore_index, 0), tree
    )


def _find_targets(seen: _Seen, inputs: Any, targets: Any) -> TargetCount | None:
    """Which tensor of the batch holds the targets that cross entropy got; targets are looked at before inputs."""
    wanted = seen.target[seen.target != seen.ignore_index]
    leaves = tensors_in((inputs, targets))
    samples = batch_size(inputs, targets)
    for leaf in reversed(range(len(leaves))):
        tensor = leaves[leaf]
        if tensor.dtype != wanted.dtype or not has_rows(tensor, samples):
            continue
        for shifted in (False, True):
            used = tensor[..., 1:] if shifted else tensor
            if torch.equal(used[used != seen.ignore_index], wanted.to(used.device)):
                return TargetCount(leaf, seen.ignore_index, seen.weight, shifted)
    return None
