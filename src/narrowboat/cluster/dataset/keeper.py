"""The actor that owns a job's workers, and gathers what they tell. It lives beside the caller, and without PyTorch.

An actor of Ray's dies with the process that started it. Were that a sender, it would take its worker with it before
the worker could close its session.
"""

from __future__ import annotations

from typing import Any

from narrowboat.cluster.dataset.counts import WorkerCounts
from narrowboat.cluster.settings import MEMORY


class Berth:
    """A worker's process: only here PyTorch is imported.

    Args:
        job: pickled ``Job``.
        counts: see ``Worker``.
    """

    def __init__(self, job: bytes, counts: WorkerCounts) -> None:
        import pickle

        from narrowboat.cluster.dataset.worker import Worker

        self._worker = Worker(pickle.loads(job), counts)

    def open(self, who: str) -> Any:
        """See ``Worker``."""
        return self._worker.open(who)

    def sweep(self, inputs: list[Any]) -> Any:
        """See ``Worker``."""
        return self._worker.sweep(inputs)

    def close(self) -> None:
        """See ``Worker``."""
        self._worker.close()

    def __ray_shutdown__(self) -> None:
        self._worker.close()


class Keeper:
    """Starts workers, and keeps what they say: what each says replaces what it said before."""

    def __init__(self) -> None:
        self._counts: dict[str, WorkerCounts] = {}

    def start(self, name: str, job: bytes, counts: WorkerCounts) -> Any:
        """The worker of that name; if there is none, one that has the node's bytes booked.

        Args:
            name: unlike that of any other job's, or node's.
            job: pickled.
            counts: that say which node it is, and what it has.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        berth: Any = ray.remote(Berth)
        return berth.options(
            name=name,
            get_if_exists=True,
            num_cpus=0,
            resources={MEMORY: counts.budget},
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=counts.node, soft=False),
        ).remote(job, counts)

    def note(self, worker: str, counts: WorkerCounts) -> None:
        """What a worker did so far."""
        self._counts[worker] = counts

    def told(self) -> list[WorkerCounts]:
        """All of it, oldest worker first."""
        return list(self._counts.values())


def start_keeper() -> Any:
    """The handle of one, on this node, which ends when nobody has it any more."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    keeper: Any = ray.remote(Keeper)
    return keeper.options(num_cpus=0, scheduling_strategy=here).remote()
