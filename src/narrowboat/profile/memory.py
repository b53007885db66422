"""What activations really take: the tensors' bytes, and what the allocator holds on top of them.

The fake pass gives the most tensor bytes alive at once. glibc keeps holes between live blocks, so the process holds
several times that, unless freed blocks go back to the system at once, which costs page faults. Which of the two is
cheaper depends on the budget; the session lets the prediction decide. The reserves were measured, see docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from narrowboat.machine.malloc import KEEPING, MallocPolicy
from narrowboat.profile.measure import fault_rate
from narrowboat.profile.use_trace import UseTrace

# (multiple of the activation bytes, bytes on top): holes grow with the activations, small blocks and arenas do not.
_RESERVE = {
    MallocPolicy.DEFAULT: (1.7, 24 << 20),
    MallocPolicy.GUARDED: (1.05, 7 << 20),
    MallocPolicy.BALANCED: (1.1, 13 << 20),
    MallocPolicy.LEAN: (1.08, 9 << 19),
    MallocPolicy.STRICT: (1.08, 3 << 20),
}
# Share of its activations that one more thread's heap keeps as holes.
_HOLES = {
    MallocPolicy.DEFAULT: 0.7,
    MallocPolicy.GUARDED: 0.7,
    MallocPolicy.BALANCED: 0.3,
    MallocPolicy.LEAN: 0.2,
    MallocPolicy.STRICT: 0.0,
}
# Which of ``use_trace.PIECES`` is the least that a policy gives back.
_PIECE_OF = {MallocPolicy.GUARDED: 2, MallocPolicy.BALANCED: 2, MallocPolicy.LEAN: 1, MallocPolicy.STRICT: 0}
_GIVEN_BACK = 0.5  # of the largest pieces, what a guarded heap faults in again


def activation_parts(trace: UseTrace, policy: MallocPolicy) -> dict[str, int]:
    """Bytes to reserve for activations under an allocator policy, by name."""
    factor, floor = _RESERVE[policy]
    reserve = int(trace.activation_bytes * (factor - 1)) + floor
    if policy is MallocPolicy.GUARDED:
        reserve += trace.kept_bytes - trace.activation_bytes
    return {"activations": trace.activation_bytes, "allocator": reserve}


def device_parts(trace: UseTrace) -> dict[str, int]:
    """Bytes to reserve for activations in a device's memory, by name, until passes have been seen.

    PyTorch's caching allocator takes segments of 2 MiB for what is small and of 20 MiB for what is not, and keeps
    holes in them; the sizes are those of its documentation, the share of holes is a guess that passes correct.
    """
    return {"activations": trace.activation_bytes, "allocator": trace.activation_bytes // 4 + (4 << 20)}


def guarded_floor(trace: UseTrace) -> int:
    """About the least that a guarded heap can be kept within, activations included; each step trims below it."""
    return int(trace.kept_bytes * 1.02) + (5 << 20)


def fault_seconds(trace: UseTrace, policy: MallocPolicy) -> float:
    """Seconds per pass that the policy spends on faulting memory in again."""
    if policy is MallocPolicy.DEFAULT:
        return 0.0
    share = _GIVEN_BACK if policy is MallocPolicy.GUARDED else 1.0
    return share * trace.taken[_PIECE_OF[policy]] / fault_rate()


# A thread that computes has a stack, packing buffers and a heap of its own, and so has each thread of its OpenMP team:
# 1.1 to 1.7 MiB was seen with one thread per operator and 1.9 MiB with two (matrix product, convolution, softmax), and
# once, with four more inputs on the way beside a busy machine, 0.2 MiB more each than 3 MiB.
_PER_WORKER, _PER_TEAM_THREAD = 5 << 18, 1 << 20


def carried_bytes(trace: UseTrace, boundaries: Iterable[int]) -> int:
    """The most bytes a pass has alive as one of the steps ``boundaries`` begins, or at its end."""
    if not trace.alive:
        return 0
    return max((trace.alive[step] for step in (*boundaries, len(trace.alive) - 1)), default=0)


def in_flight_bytes(trace: UseTrace, boundaries: Iterable[int], policy: MallocPolicy, threads: int) -> int:
    """Bytes to reserve for one more input on its way through the model while another one computes.

    It holds what lives across a boundary between blocks, its thread, and the holes that its thread's heap keeps of
    the pieces below the policy's threshold: all of them, some, or hardly any.

    Args:
        boundaries: steps at which it may be set aside.
        threads: OpenMP threads per operator.
    """
    carried = carried_bytes(trace, boundaries)
    holes = int(trace.activation_bytes * _HOLES[policy])
    if policy in KEEPING:
        holes += trace.activation_bytes - min(carried, trace.activation_bytes)
    return int(carried * _RESERVE[MallocPolicy.STRICT][0]) + holes + _PER_WORKER + _PER_TEAM_THREAD * threads
