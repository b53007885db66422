"""What the planner is told: the blocks of one pass, how long its steps compute, and the machine."""

from __future__ import annotations

from dataclasses import dataclass, field

PAGE = 4096
# What a plan is to make short: passes back to back, or one that begins when the reader has filled the window.
OBJECTIVES = ("throughput", "latency")


@dataclass(frozen=True, slots=True)
class Block:
    """Weights that are swapped in and out together.

    Attributes:
        name: the layer a person knows it by.
        nbytes: bytes it takes in the arena, page-rounded.
        read_bytes: bytes read from storage to bring it in.
        holds: the closed intervals ``(first step, last step)`` of one pass during which it must be in, in order.
    """

    name: str
    nbytes: int
    read_bytes: int
    holds: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """The storage as measured, and the way from host memory to the device where computing is done on one.

    Without a device stage, storage fills the arena. With one (``copy_bandwidth`` is not 0), the arena is the device's,
    and weights travel from storage through pinned host memory, chunk by chunk; some may keep a copy there.

    Attributes:
        bandwidth: bytes per second that arrive while the processor computes.
        read_latency: seconds a read costs on top of its bytes.
        step_overhead: seconds of bookkeeping per step.
        contention: by what share computing takes longer while storage is read all along (memory and cores are shared);
            without effect on a device, which shares neither.
        copy_bandwidth: bytes per second from pinned host memory to the device; 0: there is no device stage.
        copy_latency: seconds that bringing a block to the device costs on top of its bytes.
        host_room: bytes of pinned host memory for copies of weights that stay there, staging not counted.
        chunk: bytes that travel together; the last of them are still to be copied when a block has been read.
    """

    bandwidth: float
    read_latency: float = 0.0001
    step_overhead: float = 0.0
    contention: float = 0.0
    copy_bandwidth: float = 0.0
    copy_latency: float = 1e-5
    host_room: int = 0
    chunk: int = 8 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """One pass of one model.

    Attributes:
        blocks: in order of first use.
        step_seconds: compute time of each step (see ``profile.UseTrace``), without any waiting.
        fixed_bytes: what the budget pays besides weights: buffers, activations, workspaces, staging.
        fixed_parts: ``fixed_bytes`` by name, for the explanation.
        busy_seconds: as ``step_seconds``, while storage is read all along; empty where not measured by step
            (``Machine.contention`` stands in).
        from_idle: passes come with pauses, in which the window fills; else back to back.
    """

    blocks: tuple[Block, ...]
    step_seconds: tuple[float, ...]
    fixed_bytes: int = 0
    fixed_parts: tuple[tuple[str, int], ...] = field(default=())
    busy_seconds: tuple[float, ...] = ()
    from_idle: bool = False

    @property
    def weight_bytes(self) -> int:
        """Arena bytes with every block in."""
        return sum(block.nbytes for block in self.blocks)

    def occurrences(self) -> list[tuple[int, int, int]]:
        """``(first step, last step, block index)`` of every hold of the pass, in the order reads are wanted."""
        return sorted((first, last, i) for i, block in enumerate(self.blocks) for first, last in block.holds)
