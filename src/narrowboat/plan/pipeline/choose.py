"""Where to cut, and which node takes which part: exact dynamic programming over cuts and nodes.

The state is the set of nodes used, the last of them, and how many pieces are done. What is left costs

    throughput:  W(used, last, i) = min over node, j of max(hop, steady(node, i, j), W(used+node, node, j))
    latency:     the same with sums, and ``first`` for ``steady``

Planning a stage takes milliseconds, and there are hundreds: so the programme first goes by lower bounds, the stages it
chooses are planned, their bounds replaced by what the plans take, and so on until the best way known is within
``ENOUGH`` of what the bounds allow (Dellin and Srinivasa, "A Unifying Formalism for Shortest Path Problems with
Expensive Edge Evaluations via Lazy Best-First Search", ICAPS 2016). For throughput, a short way among those with the
best period is taken. With more nodes than
``EXACT``, the strongest come first and keep that order, each used or left out; which of them follow one another is
then no longer tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from narrowboat.errors import PlacementError
from narrowboat.plan.pipeline.model import CALLER, Chain, Links, Node, link_between
from narrowboat.plan.pipeline.recurrence import Flow, Hop, flow
from narrowboat.plan.pipeline.stage import Refusal, Stage, Stages, page_up
from narrowboat.quantities import format_bytes

OBJECTIVES = ("throughput", "latency")
EXACT = 6
"""Nodes up to which every order of them is tried."""
ENOUGH = 5e-3
"""A split so close to the bound is not searched for a better one."""
_SLACK = 1e-9
_NEVER = float("inf")


@dataclass(frozen=True)
class Split:
    """The answer.

    Attributes:
        stages: in order; each knows its node and its plan.
        hops: from the caller, between stages, back to the caller.
        in_flight: most inputs on their way at once.
    """

    stages: tuple[Stage, ...]
    hops: tuple[Hop, ...]
    in_flight: int

    def flow(self, inputs: int = 1) -> Flow:
        """What is predicted for so many inputs."""
        return flow([stage.time for stage in self.stages], self.hops, inputs, self.in_flight)


def split(
    chain: Chain,
    nodes: Sequence[Node],
    links: Links,
    *,
    objective: str = "throughput",
    in_flight: int | None = None,
    stages: int | None = None,
) -> Split:
    """The best split of ``chain`` over some of ``nodes``.

    Args:
        objective: what to make short: ``"throughput"``, the time between outputs of many inputs; ``"latency"``, that
            of one.
        in_flight: most inputs on their way at once; None: twice as many as there can be stages.
        stages: how many; None: as many as are best.

    Raises:
        PlacementError: nothing fits; names each node with the layer that it cannot hold, and the smallest budget that
            would do.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"no such objective: {objective}")
    most = min(len(nodes), len(chain.pieces))
    if stages is not None and not 1 <= stages <= most:
        raise PlacementError(
            f"{stages} stages were asked for, and there are {len(nodes)} nodes and {len(chain.pieces)} places where "
            "the model may be parted"
        )
    in_flight = in_flight or 2 * (stages or most)
    ordered = tuple(nodes)
    if len(nodes) > EXACT:
        ordered = tuple(sorted(nodes, key=lambda n: (-n.budget, n.pace)))
    table = Stages(chain, ordered, in_flight)
    search = _Search(table, links, stages, all_orders=len(nodes) <= EXACT)
    if objective == "latency":
        found = search.best(latency=True)
    else:
        found = search.best(latency=False)
        if found is not None:
            search.ceiling = found[0] * (1 + _SLACK)
            found = search.best(latency=True) or found
    if found is None:
        raise _refused(table, stages)
    taken = [stage for node, begin, end in found[1] if isinstance(stage := table.get(node, begin, end), Stage)]
    names = [CALLER, *(stage.node for stage in taken), CALLER]
    cuts = [0, *(stage.end for stage in taken)]
    hops = [
        link_between(links, sender, receiver).hop(chain.crossing(at))
        for sender, receiver, at in zip(names, names[1:], cuts, strict=False)
    ]
    return Split(tuple(taken), tuple(hops), in_flight)


_Key = tuple[int, int, int]
_Way = tuple[_Key, ...]


class _Search:
    """The dynamic programme over bounds, and the plans of those stages that it would choose by them.

    Attributes:
        ceiling: no stage and no link may be slower than this when latency is made short.
    """

    def __init__(self, table: Stages, links: Links, stages: int | None, *, all_orders: bool) -> None:
        self._table, self._links, self._stages, self._all_orders = table, links, stages, all_orders
        self._known: dict[_Key, Stage | Refusal] = {}
        self.ceiling = _NEVER

    def best(self, *, latency: bool) -> tuple[float, _Way] | None:
        """The cost and the way ``(node, begin, end), ...``; None if nothing fits."""
        best: tuple[float, _Way] | None = None
        while True:
            found = self._by_bounds(latency)
            if found is None:  # what was found before went by bounds that are known better now
                return best
            bound, way = found
            unknown = [key for key in way if key not in self._known]
            for key in unknown:
                self._known[key] = self._table.get(*key)
            cost = self._cost_of(way, latency)
            if best is None or cost < best[0]:
                best = (cost, way) if cost < _NEVER else best
            if best is not None and (not unknown or best[0] <= bound * (1 + ENOUGH)):
                return best

    def _stage(self, key: _Key, latency: bool) -> float:
        """Seconds of a stage: its plan's where it has been made, else a bound; never, if it cannot be."""
        known = self._known.get(key)
        if known is None:
            floor = self._table.at_least(*key)
            return floor if floor <= self.ceiling else _NEVER
        if isinstance(known, Refusal) or known.time.steady > self.ceiling:
            return _NEVER
        return known.time.first if latency else known.time.steady

    def _hop(self, last: int, node: int, at: int, latency: bool) -> float:
        nodes = self._table.nodes
        sender, receiver = (nodes[i].name if i >= 0 else CALLER for i in (last, node))
        took = link_between(self._links, sender, receiver).hop(self._table.chain.crossing(at))
        if took.seconds > self.ceiling:
            return _NEVER
        return took.total if latency else took.seconds

    def _cost_of(self, way: _Way, latency: bool) -> float:
        last, costs = -1, []
        for node, begin, _ in way:
            costs.append(self._hop(last, node, begin, latency))
            last = node
        costs += [self._hop(last, -1, way[-1][2], latency), *(self._stage(key, latency) for key in way)]
        return sum(costs) if latency else max(costs)

    def _by_bounds(self, latency: bool) -> tuple[float, _Way] | None:
        count, nodes = len(self._table.chain.pieces), range(len(self._table.nodes))

        @cache
        def rest(used: int, last: int, at: int) -> tuple[float, _Way] | None:
            if at == count:
                if self._stages is not None and used.bit_count() != self._stages:
                    return None
                end = self._hop(last, -1, at, latency)
                return (end, ()) if end < _NEVER else None
            if self._stages is not None and used.bit_count() >= self._stages:
                return None
            least: tuple[float, _Way] | None = None
            for node in nodes:
                if used >> node & 1 or (not self._all_orders and node < last):
                    continue
                way_in = self._hop(last, node, at, latency)
                for end in range(at + 1, count + 1):
                    seconds = self._stage((node, at, end), latency)
                    here = way_in + seconds if latency else max(way_in, seconds)
                    if here == _NEVER or (least is not None and here >= least[0]):
                        continue
                    after = rest(used | 1 << node, node, end)
                    if after is None:
                        continue
                    cost = here + after[0] if latency else max(here, after[0])
                    if least is None or cost < least[0]:
                        least = cost, ((node, at, end), *after[1])
            return least

        return rest(0, -1, 0)


def _refused(table: Stages, stages: int | None) -> PlacementError:
    """What to say where nothing fits."""
    pieces, count = table.chain.pieces, len(table.chain.pieces)
    said: dict[str, str] = {}
    for node in table.nodes:
        needs = [table.needs(at, at + 1) for at in range(count)]
        worst = max(range(count), key=lambda at: needs[at][0])
        least, limiter = needs[worst]
        if least + node.staging > node.budget:
            said[node.name] = (
                f"gives {format_bytes(node.budget)}, and {limiter} (in {pieces[worst].name}) alone takes "
                f"{format_bytes(page_up(least + node.staging))}"
            )
        else:
            least, limiter = table.needs(0, count)
            said[node.name] = (
                f"gives {format_bytes(node.budget)}: each layer fits, and not as many as there would be for it; "
                f"the whole takes {format_bytes(page_up(least + node.staging))} (set by {limiter})"
            )
    least = smallest_budget(table, stages)
    each = f"each of {len(table.nodes)} nodes" if len(table.nodes) > 1 else "the node"
    alike: dict[str, list[str]] = {}
    for name, why in said.items():
        alike.setdefault(why, []).append(name)
    reasons = "; ".join(f"node {', node '.join(names)} {why}" for why, names in alike.items())
    return PlacementError(
        f"the model fits no split over {len(table.nodes)} node{'s' * (len(table.nodes) > 1)}: {reasons}. "
        f"It would do if {each} gave {format_bytes(least)} ({least} bytes)",
        {"model": said},
    )


def smallest_budget(table: Stages, stages: int | None = None) -> int:
    """Bytes that would do if every node gave as many: the least largest part of any split."""
    count, most = len(table.chain.pieces), stages or len(table.nodes)
    staging = max(node.staging for node in table.nodes)

    @cache
    def least(at: int, left: int) -> int | None:
        if at == count:
            return 0 if stages is None or left == 0 else None
        if left == 0:
            return None
        options = []
        for end in range(at + 1, count + 1):
            after = least(end, left - 1)
            if after is not None:
                options.append(max(table.needs(at, end)[0], after))
        return min(options, default=None)

    found = least(0, most)
    assert found is not None  # a piece for each stage there is
    return page_up(found + staging)
