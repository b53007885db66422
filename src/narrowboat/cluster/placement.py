"""Which task goes to which node: first fit, the largest first, with the admission test as what fits.

Partitioned scheduling: a task lives on one node, whose own analysis promises its deadlines. First-fit decreasing is
the heuristic of bin packing (Johnson 1973); several measures of "large" are tried, since a task has bytes and time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wanted:
    """A task that needs a node.

    Attributes:
        name: of it.
        guaranteed: its deadlines are promised; it is placed before all that promise nothing.
        utilisation: of one node's processor.
        nbytes: of memory that it needs alone.
        deadline: relative, microseconds.
    """

    name: str
    guaranteed: bool = True
    utilisation: float = 0.0
    nbytes: int = 0
    deadline: int = 0


@dataclass(frozen=True)
class Fit:
    """What a node says of a set of tasks.

    Attributes:
        fits: they would run there, with all that is promised.
        reason: why not.
    """

    fits: bool
    reason: str = ""


Fits = Callable[[str, frozenset[str]], Awaitable[Fit]]


@dataclass
class Placement:
    """Where everything goes.

    Attributes:
        nodes: names of tasks by node.
        refused: by task that found no place, what each node said.
    """

    nodes: dict[str, tuple[str, ...]]
    refused: dict[str, dict[str, str]] = field(default_factory=dict)

    def node_of(self, task: str) -> list[str]:
        """Nodes that run a task."""
        return [node for node, tasks in self.nodes.items() if task in tasks]


async def place(
    wanted: Sequence[Wanted], nodes: Mapping[str, int], fits: Fits, kept: Mapping[str, Sequence[str]] | None = None
) -> Placement:
    """Place tasks on nodes; what is there already stays where it is.

    Args:
        wanted: tasks that need a place.
        nodes: bytes that each gives, in the order in which they are tried.
        fits: the test, of a node and all the tasks that it would run.
        kept: tasks that nodes run already.

    Returns:
        The first placement that refuses no promise, over the orders that are tried; else the one that keeps most.
    """
    running = {node: tuple((kept or {}).get(node, ())) for node in nodes}
    known: dict[tuple[str, frozenset[str]], Fit] = {}

    async def ask(node: str, tasks: frozenset[str]) -> Fit:
        if (node, tasks) not in known:
            known[node, tasks] = await fits(node, tasks)
        return known[node, tasks]

    most = max(nodes.values(), default=1)
    promised = [task for task in wanted if task.guaranteed]
    best: Placement | None = None
    for order in _orders(promised, most):
        made = await _first_fit(order, running, ask)
        if best is None or len(made.refused) < len(best.refused):
            best = made
        if not best.refused:
            break
    assert best is not None
    free = sorted((task for task in wanted if not task.guaranteed), key=lambda task: -_size(task, most))
    return await _spread(free, best, ask)


def _size(task: Wanted, most: int) -> float:
    """How much of a node a task takes, of what it takes most."""
    return max(task.utilisation, task.nbytes / most)


def _orders(tasks: Sequence[Wanted], most: int) -> list[list[Wanted]]:
    """Decreasing by what each takes most of; then by time, by bytes, and the most urgent first."""
    return [
        sorted(tasks, key=lambda task: (-_size(task, most), task.name)),
        sorted(tasks, key=lambda task: (-task.utilisation, task.name)),
        sorted(tasks, key=lambda task: (-task.nbytes, task.name)),
        sorted(tasks, key=lambda task: (task.deadline, task.name)),
    ]


async def _first_fit(tasks: Sequence[Wanted], running: Mapping[str, tuple[str, ...]], ask: Fits) -> Placement:
    made = Placement(dict(running))
    for task in tasks:
        await _put(task, list(made.nodes), made, ask)
    return made


async def _spread(tasks: Sequence[Wanted], made: Placement, ask: Fits) -> Placement:
    """Tasks that promise nothing share what is left: each goes where the fewest run."""
    for task in tasks:
        await _put(task, sorted(made.nodes, key=lambda node: len(made.nodes[node])), made, ask)
    return made


async def _put(task: Wanted, nodes: Sequence[str], made: Placement, ask: Fits) -> None:
    """On the first of the nodes that has room."""
    said: dict[str, str] = {}
    for node in nodes:
        told = await ask(node, frozenset({*made.nodes[node], task.name}))
        if told.fits:
            made.nodes[node] = (*made.nodes[node], task.name)
            return
        said[node] = told.reason
    made.refused[task.name] = said or {"": "there is no node"}
