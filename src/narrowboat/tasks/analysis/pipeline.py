"""One job's load and compute as a chain of segments, and how long the pipeline takes.

At a boundary both engines are idle; the next segment computes block j while block j + 1 is loaded, and ends when both
have ended. So the two engines act as one processor, and a job is a chain of segments that are not preempted:
``[L1], [max(C1, L2)], ..., [max(Cn-1, Ln)], [Cn]``.
"""

from __future__ import annotations

from collections.abc import Sequence

from narrowboat.tasks.analysis.model import Block


def segments(blocks: Sequence[Block], overhead: int = 0) -> tuple[int, ...]:
    """Worst lengths of a job's segments.

    Args:
        blocks: of one job, in order.
        overhead: time of one boundary (decision, hand-over, binding), charged to every segment.
    """
    loads = [block.load for block in blocks]
    lengths = [max(block.compute, load) for block, load in zip(blocks, [*loads[1:], 0], strict=True)]
    # A first block that is there already needs no segment of its own.
    chain = [loads[0], *lengths] if loads[0] else lengths
    return tuple(length + overhead for length in chain)


def whole_swap(blocks: Sequence[Block]) -> list[Block]:
    """The model loaded as one, then run: what swapping whole models does."""
    return [
        Block(
            sum(block.load for block in blocks),
            sum(block.compute for block in blocks),
            sum(block.nbytes for block in blocks),
        )
    ]


def makespan(blocks: Sequence[Block], buffers: int) -> int:
    """Time of one job alone when ``buffers`` blocks fit at once, by the max-plus recurrence.

    A load may start when the load before it has ended and the block ``buffers`` before it has been computed.

    Raises:
        ValueError: no buffer.
    """
    if buffers < 1:
        raise ValueError("a pipeline needs at least one buffer")
    return _recurrence(blocks, [j - buffers for j in range(len(blocks))])


def makespan_in_bytes(blocks: Sequence[Block], nbytes: int) -> int:
    """The same where blocks share that many bytes.

    Raises:
        ValueError: a block is larger than that.
    """
    waits: list[int] = []
    for j, block in enumerate(blocks):
        if block.nbytes > nbytes:
            raise ValueError(f"block {j} has {block.nbytes} bytes, more than the {nbytes} there are")
        held, k = block.nbytes, j - 1
        while k >= 0 and held + blocks[k].nbytes <= nbytes:
            held += blocks[k].nbytes
            k -= 1
        waits.append(k)
    return _recurrence(blocks, waits)


def _recurrence(blocks: Sequence[Block], waits: Sequence[int]) -> int:
    """End of the last compute; load j waits for the compute of block ``waits[j]`` (none if negative)."""
    loaded = computed = 0
    ends: list[int] = []
    for j, block in enumerate(blocks):
        free = ends[waits[j]] if waits[j] >= 0 else 0
        loaded = max(loaded, free) + block.load
        computed = max(loaded, computed) + block.compute
        ends.append(computed)
    return computed


def stages_makespan(times: Sequence[Sequence[int]], buffers: Sequence[int]) -> int:
    """End of a job through any number of stages: storage to host, host to device, compute.

    ``f[s][j] = max(f[s-1][j], f[s][j-1], f[s+1][j - buffers[s]]) + t[s][j]``

    Args:
        times: by stage, by block.
        buffers: blocks that fit between stage s and the next, for all stages but the last.
    """
    count = len(times[0]) if times else 0
    ends = [[0] * count for _ in times]
    for j in range(count):
        for s, stage in enumerate(times):
            ready = ends[s - 1][j] if s else 0
            if j:
                ready = max(ready, ends[s][j - 1])
            if s < len(times) - 1 and j >= buffers[s]:
                ready = max(ready, ends[s + 1][j - buffers[s]])
            ends[s][j] = ready + stage[j]
    return ends[-1][-1] if count else 0
