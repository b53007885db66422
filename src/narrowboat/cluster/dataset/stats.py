"""What mapping a data set took, by node."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from narrowboat.cluster.dataset.counts import WorkerCounts
from narrowboat.cluster.dataset.keeper import start_keeper
from narrowboat.quantities import format_bytes


@dataclass(frozen=True)
class NodeStats:
    """What one node did, over all workers that it has had.

    A batch that was done again, since its first node died, is counted where it was begun as far as it was done there.

    Attributes:
        node: Ray's identity of it.
        name: of it.
        workers: that it has had.
        closed: of them, those that closed their session in good order; the others were killed, or still run.
        budget_bytes: of each.
        inputs: rows that went through the model.
        seconds: busy with them, waiting for weights included.
        bytes_read: of weights, from storage.
        peak_bytes: most resident memory of a worker over its baseline.
        inputs_per_sweep: as last decided.
    """

    node: str
    name: str
    workers: int
    closed: int
    budget_bytes: int
    inputs: int
    seconds: float
    bytes_read: int
    peak_bytes: int
    inputs_per_sweep: int

    @property
    def inputs_per_second(self) -> float:
        """While busy; 0 where nothing was done."""
        return self.inputs / self.seconds if self.seconds else 0.0


class MapStats:
    """Gathers what nodes did: give one to ``map_dataset(stats=)``, and read it while the data set is used, or after.

    One ``MapStats`` adds up all data sets that it was given to.

    Attributes:
        left_out: by node, why it does not take part.
    """

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}
        self._keeper: Any = None

    def begin(self) -> Any:
        """The handle of what workers tell. For ``map_dataset``."""
        if self._keeper is None:
            self._keeper = start_keeper()
        return self._keeper

    def nodes(self) -> list[NodeStats]:
        """By node, the one with most inputs first."""
        if self._keeper is None:
            return []
        import ray

        by_node: dict[str, list[WorkerCounts]] = {}
        for counts in ray.get(self._keeper.told.remote()):
            by_node.setdefault(counts.node, []).append(counts)
        return sorted(map(_added, by_node.values()), key=lambda stats: (-stats.inputs, stats.name))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``nodes``, each as ``NodeStats`` has it, and ``left_out``."""
        return {"nodes": [asdict(node) for node in self.nodes()], "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        rows = [("node", "inputs", "per sweep", "busy", "read", "peak", "budget")]
        rows += [
            (
                node.name,
                f"{node.inputs:,}",
                str(node.inputs_per_sweep),
                f"{node.seconds:.1f} s",
                format_bytes(node.bytes_read),
                format_bytes(node.peak_bytes),
                format_bytes(node.budget_bytes),
            )
            for node in self.nodes()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, *(f"{name} is left out: {why}" for name, why in self.left_out.items())])


def _added(counts: list[WorkerCounts]) -> NodeStats:
    last = counts[-1]
    return NodeStats(
        node=last.node,
        name=last.name,
        workers=len(counts),
        closed=sum(one.closed for one in counts),
        budget_bytes=last.budget,
        inputs=sum(one.inputs for one in counts),
        seconds=sum(one.seconds for one in counts),
        bytes_read=sum(one.bytes_read for one in counts),
        peak_bytes=max(one.peak_bytes for one in counts),
        inputs_per_sweep=last.inputs_per_sweep,
    )
