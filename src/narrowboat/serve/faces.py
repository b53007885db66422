"""Tasks as clients see them, made anew when another plan is in force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrowboat.errors import NoSuchTaskError
from narrowboat.serve.catalogue import Catalogue
from narrowboat.serve.interface import TaskFace
from narrowboat.serve.plan import takes_requests
from narrowboat.tasks.costed import burst_of
from narrowboat.tasks.spec.schema import TaskSpec
from narrowboat.tasks.task_set import TaskSet
from narrowboat.tasks.tensors import Signature
from narrowboat.zoo.text_facts import facts_of


class Faces:
    """All of them.

    Args:
        catalogue: of tasks that are known.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._facts: dict[str, dict[str, Any]] = {}
        self._faces = {spec.name: _face(spec, ready=False, reason="starting") for spec in catalogue.specs.values()}

    def all(self) -> Sequence[TaskFace]:
        """By name."""
        return [self._faces[name] for name in sorted(self._faces)]

    def one(self, name: str) -> TaskFace:
        """One of them.

        Raises:
            NoSuchTaskError: there is none.
        """
        face = self._faces.get(name)
        if face is None:
            raise NoSuchTaskError(f"there is no task {name!r:.80}; there are {', '.join(sorted(self._faces))}")
        return face

    def renew(self, known: TaskSet, running: TaskSet) -> None:
        """After a change.

        Args:
            known: all that could run.
            running: those that do.
        """
        signatures, images = known.about("signatures"), known.about("images")
        now = {spec.name: spec for spec in running.settings.tasks}
        bounds = {task.name: task.bound for task in running.admit().tasks}
        for name, spec in self._catalogue.specs.items():
            if name not in self._facts:
                self._facts[name] = self._facts_of(spec, images.get(name))
            ready = name in now
            told = signatures.get(name, {})
            self._faces[name] = _face(
                now.get(name, spec),
                ready=ready,
                reason="" if ready else "it is not loaded",
                bound=bounds.get(name) if ready and spec.guaranteed else None,
                signature=Signature.from_json(told) if "inputs" in told else None,
                facts=self._facts[name],
            )

    def _facts_of(self, spec: TaskSpec, image: dict[str, Any] | None) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if spec.model is not None:
            facts.update(facts_of(spec.model, self._catalogue.folder))
        if image is not None:
            facts["image"] = image
        labels = self._catalogue.labels(spec.name)
        if labels:
            facts["labels"] = labels
        return facts


def _face(
    spec: TaskSpec,
    *,
    ready: bool,
    reason: str = "",
    bound: int | None = None,
    signature: Signature | None = None,
    facts: dict[str, Any] | None = None,
) -> TaskFace:
    return TaskFace(
        spec.name,
        spec.model or "",
        ready,
        takes_requests(spec),
        spec.guaranteed,
        signature.inputs if signature is not None else (),
        signature.outputs if signature is not None else (),
        bound,
        spec.relative_deadline,
        spec.step,
        burst_of(spec),
        reason,
        facts or {},
    )
