"""What activations really take: the tensors' bytes, and what the allocator holds on top of them.

The fake pass gives the most tensor bytes alive at once. glibc keeps holes between live blocks, so the process holds
several times that, unless freed blocks go back to the system at once, which costs page faults. Which of the two is
cheaper depends on the budget; the session lets the prediction decide. The reserves were measured, see docs/memory.md.
"""

from __future__ import annotations

from narrowboat.machine.malloc import MallocPolicy
from narrowboat.profile.measure import fault_rate
from narrowboat.profile.use_trace import UseTrace

# (multiple of the activation bytes, bytes on top): holes grow with the activations, small blocks and arenas do not.
_RESERVE = {
    MallocPolicy.DEFAULT: (1.7, 24 << 20),
    MallocPolicy.BALANCED: (1.3, 12 << 20),
    MallocPolicy.STRICT: (1.15, 3 << 20),
}


def activation_parts(trace: UseTrace, policy: MallocPolicy) -> dict[str, int]:
    """Bytes to reserve for activations under an allocator policy, by name."""
    factor, floor = _RESERVE[policy]
    return {"activations": trace.activation_bytes, "allocator": int(trace.activation_bytes * (factor - 1)) + floor}


def fault_seconds(trace: UseTrace, policy: MallocPolicy) -> float:
    """Seconds per pass that the policy spends on faulting memory in again."""
    if policy is MallocPolicy.DEFAULT:
        return 0.0
    return trace.taken[0 if policy is MallocPolicy.STRICT else 1] / fault_rate()
