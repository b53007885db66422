"""How long inputs take through stages: the recurrence of ``plan.timing`` one floor up, with the network as stages.

Within a stage, reading for the next input goes on while this one computes, and while the stage waits. Of a stage's
pass two times are known (``plan.timing.simulate``): ``steady``, passes back to back, and ``first``, a pass that begins
after a rest, with the window full. Input m leaves stage s at

    out[s, m] = max(out[s, m-1] + steady[s], in[s, m] + first[s])

The first term is the way through reading (the pass before ended, and what is read comes no faster), the second that
through the input's own coming. A pass after a short rest may take longer than this says: some reading was still to be
done. The error is nothing where a stage never rests, which is where throughput is decided, and nothing after a rest
that lasts for the window, which is where the latency of one input is.

A link carries one input at a time and takes ``seconds`` for its bytes; its ``latency`` delays without occupying it:

    sent[h, m] = max(sent[h, m-1], out[s, m]) + seconds[h]        in[s+1, m] = sent[h, m] + latency[h]

At most ``in_flight`` inputs are on their way: input m enters when input m - in_flight has come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of a pass through one stage.

    Attributes:
        first: after a rest, with the window full.
        steady: back to back; not less than ``first``.
    """

    first: float
    steady: float


@dataclass(frozen=True, slots=True)
class Hop:
    """One input's way over one link.

    Attributes:
        latency: seconds that delay it.
        seconds: during which it occupies the link.
    """

    latency: float
    seconds: float

    @property
    def total(self) -> float:
        """Seconds on the way."""
        return self.latency + self.seconds


@dataclass(frozen=True, slots=True)
class Flow:
    """What is predicted.

    Attributes:
        latency: seconds of one input alone, from the caller and back to it.
        period: seconds between two outputs once many inputs are on their way.
        done: seconds after the beginning at which each input's output is with the caller.
    """

    latency: float
    period: float
    done: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """Seconds until the last output."""
        return self.done[-1] if self.done else 0.0

    @property
    def throughput(self) -> float:
        """Inputs per second once many are on their way."""
        return 1 / self.period if self.period > 0 else float("inf")


def flow(stages: Sequence[StageTime], hops: Sequence[Hop], inputs: int = 1, in_flight: int = 1) -> Flow:
    """Run the recurrence.

    Args:
        stages: in order.
        hops: one more: to the first stage, between stages, and back to the caller.
        inputs: how many, all there at the beginning.
        in_flight: most of them on their way at once.
    """
    never = float("-inf")
    out, sent = [never] * len(stages), [never] * len(hops)
    done: list[float] = []
    for number in range(inputs):
        now = done[number - in_flight] if number >= in_flight else 0.0
        for at, hop in enumerate(hops):
            sent[at] = max(sent[at], now) + hop.seconds
            now = sent[at] + hop.latency
            if at < len(stages):
                out[at] = now = max(out[at] + stages[at].steady, now + stages[at].first)
        done.append(now)
    latency = sum(stage.first for stage in stages) + sum(hop.total for hop in hops)
    return Flow(latency, period(stages, hops, in_flight), tuple(done))


def period(stages: Sequence[StageTime], hops: Sequence[Hop], in_flight: int) -> float:
    """Seconds between two outputs in the long run: the slowest stage or link, or the way round, shared.

    The largest mean of a cycle of the recurrence's graph: the loops at each stage and link, and those that go once
    through everything and back over ``in_flight`` inputs.
    """
    own = [stage.steady for stage in stages] + [hop.seconds for hop in hops]
    way = sum(stage.first for stage in stages) + sum(hop.total for hop in hops)
    return max([*own, way / in_flight], default=0.0)
