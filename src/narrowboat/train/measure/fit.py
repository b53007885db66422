"""Two tapes of the same pass at two batch sizes give the tape of any: bytes = a + b n. Pure, no torch."""

from __future__ import annotations

from dataclasses import replace

from narrowboat.train.measure.calls import Call, between
from narrowboat.train.tape.structure import Tape


def alike(small: Tape, large: Tape) -> bool:
    """Whether two tapes are of the same operators, storages and backward events."""
    return (
        small.signature() == large.signature()
        and len(small.backward) == len(large.backward)
        and all(
            (a.kind, a.storage, a.saved_at) == (b.kind, b.storage, b.saved_at)
            for a, b in zip(small.backward, large.backward, strict=True)
        )
        and all(
            a.saved_at == b.saved_at and a.dies == b.dies for a, b in zip(small.storages, large.storages, strict=True)
        )
    )


def at_batch(small: Tape, large: Tape, batch: int) -> Tape:
    """The tape at ``batch`` samples, every byte count fitted as a + b n and rounded up.

    The two tapes have to be ``alike`` and of different batch sizes.
    """
    span = large.batch - small.batch

    def fitted(a: int, b: int) -> int:
        if a == b:
            return a
        # Exact for whatever grows by whole bytes per sample; rounded up otherwise.
        return max(0, -((-(a * span + (b - a) * (batch - small.batch))) // span))

    def called(a: Call | None, b: Call | None) -> Call | None:
        return between(a, b, fitted) if a is not None and b is not None else None

    storages = [
        replace(
            a,
            nbytes=fitted(a.nbytes, b.nbytes),
            # Too small to be worth it in a small batch, it may well be in a large one.
            shrinks=fitted(a.shrinks or -(-b.shrinks * a.nbytes // b.nbytes), b.shrinks) if b.shrinks else 0,
            saved_at=list(a.saved_at),
        )
        for a, b in zip(small.storages, large.storages, strict=True)
    ]
    backward = [
        replace(a, live=fitted(a.live, b.live), call=called(a.call, b.call))
        for a, b in zip(small.backward, large.backward, strict=True)
    ]
    ops = [replace(b, call=called(a.call, b.call)) for a, b in zip(small.ops, large.ops, strict=True)]
    return replace(large, ops=ops, storages=storages, backward=backward, batch=batch)


def with_times(tape: Tape, timed: Tape) -> Tape:
    """``tape`` with the durations of ``timed``, scaled by the number of samples.

    Operators are matched in order; the backward pass's moments by which saving was asked for.
    """
    scale = tape.batch / timed.batch
    ops = [op.paced(other, scale) for op, other in zip(tape.ops, timed.ops, strict=True)]
    needs: dict[tuple[int, int], float] = {}
    for event in timed.backward:
        if event.kind == "need":
            needs.setdefault((event.storage, event.saved_at), event.seconds)
    backward, now = [], 0.0
    for event in tape.backward:
        if event.kind == "need":
            now = max(now, needs.get((event.storage, event.saved_at), now / scale if scale else 0.0) * scale)
        backward.append(replace(event, seconds=now))
    return replace(
        tape,
        ops=ops,
        backward=backward,
        forward_seconds=timed.forward_seconds * scale,
        backward_seconds=timed.backward_seconds * scale,
        overhead=timed.overhead,
    )
