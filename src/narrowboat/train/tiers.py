"""Where weights, gradients and optimizer state may be, what that holds in memory, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from narrowboat.train.measure.chain import Rates
from narrowboat.train.static import StaticBytes
from narrowboat.train.weights import TrainingWeights

_LEAST_BUCKET, _MOST_BUCKET = 1 << 20, 32 << 20
_BUCKETS_IN_BUDGET = 40
_BUCKETS_IN_MEMORY = 3  # one stepped, one coming, one leaving
_WINDOWS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85)  # shares of the budget tried for the window of weights
_OVERLAP = 0.5  # of reading weights with computing, as far as plans count on it


@dataclass(frozen=True, slots=True)
class Tier:
    """A place for weights, gradients and optimizer state.

    In order of what they cost: "memory"; "state": the optimizer's state is on storage, stepped bucket by bucket;
    "gradients": those too. Weights on storage take turns in a window beside any of them.

    Attributes:
        name: one of these.
        static: bytes held whatever the plan of the passes.
        seconds: of reading and writing per step.
        written: bytes written per step.
        window: bytes for weights that are on storage; 0 where none are.
        bucket: bytes of parameters that are stepped at a time, where they are stepped in buckets.
        growing: gradients are in memory, and come one by one in the backward pass of a batch that is not split.
    """

    name: str
    static: StaticBytes
    seconds: float = 0.0
    written: int = 0
    window: int = 0
    bucket: int = _LEAST_BUCKET
    growing: bool = False


def _bucket_bytes(static: StaticBytes, budget: int) -> int:
    """A sixteenth of the state, but not so much that several of them weigh in the budget."""
    wanted = min(max(static.optimizer, static.gradients) // 16, budget // _BUCKETS_IN_BUDGET)
    return min(max(wanted, _LEAST_BUCKET), _MOST_BUCKET)


def tiers(
    static: StaticBytes,
    budget: int,
    *,
    rates: Rates,
    in_backward: bool,
    storage: bool,
    weights: TrainingWeights | None,
    growing: bool = True,
) -> list[Tier]:
    """The tiers that there are, quickest first.

    Args:
        static: with everything in memory but the weights on storage.
        budget: bytes, of which the window of weights may have a part.
        rates: of the folder.
        in_backward: gradients are stepped as they come, and do not wait for a norm to clip to.
        storage: state may go to the folder.
        weights: on storage; None where all are in memory.
        growing: gradients come one by one; False where something makes room for all of them beforehand.
    """
    growing = growing and not in_backward
    bucket = _bucket_bytes(static, budget)
    if in_backward:
        static = replace(static, gradients=min(static.gradients, 2 * max(bucket, static.largest_gradient)))
    found = [Tier("memory", static, bucket=bucket, growing=growing)]
    if storage and rates.write is not None and rates.read is not None:
        moving = rates.write + rates.read
        # A parameter larger than a bucket is one by itself, and no other is read or written beside it.
        held = min(static.optimizer, _BUCKETS_IN_MEMORY * bucket + 2 * static.largest_gradient)
        moved = static.optimizer
        if moved > held:
            out = replace(static, optimizer=held)
            found.append(Tier("state", out, moved * moving, moved, bucket=bucket, growing=growing))
        gradients = min(static.gradients, 4 * bucket + static.largest_gradient)
        if gradients < static.gradients or (weights is not None and weights.stored is not None):
            moved += static.gradients
            both = replace(static, optimizer=held, gradients=gradients)
            found.append(Tier("gradients", both, moved * moving, moved, bucket=bucket))
    if weights is None:
        return found
    if weights.stored is not None:
        # What is trained on storage is stepped from storage.
        found = found[-1:]
    return [_with_window(tier, window, weights, rates) for tier in found for window in _windows(tier, weights, budget)]


def _windows(tier: Tier, weights: TrainingWeights, budget: int) -> list[int]:
    least = weights.minimum
    if weights.stored is not None:
        # A bucket of them is stepped at a time, and is in the window together.
        together = min(tier.bucket + tier.static.largest_gradient, weights.total_bytes)
        least = max(least, together + (weights.minimum >> 2))
    most = max(least, weights.total_bytes + (weights.minimum >> 2))
    return sorted({min(max(int(share * budget), least), most) for share in _WINDOWS}, reverse=True)


def _with_window(tier: Tier, window: int, weights: TrainingWeights, rates: Rates) -> Tier:
    out = max(0, weights.total_bytes - window)
    read = 2 * out * (rates.read or 1e-9) * (1 - _OVERLAP)  # in the forward pass and in the backward pass
    trained = weights.stored.records.file_bytes // 2 if weights.stored is not None else 0
    return replace(
        tier,
        static=replace(tier.static, weights=tier.static.weights + window),
        seconds=tier.seconds + read + trained * ((rates.write or 1e-9) + (rates.read or 1e-9)),
        written=tier.written + trained,
        window=window,
    )
