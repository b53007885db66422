"""What would be if the budget or the tasks were others: judged, and nothing changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from narrowboat.errors import BadRequestError, NarrowboatError, QuantityError
from narrowboat.quantities import parse_bytes
from narrowboat.serve.catalogue import Catalogue
from narrowboat.serve.plan import plan_of
from narrowboat.tasks.task_set import TaskSet
from narrowboat.tasks.transition import plan_change

_KEYS = ("budget", "add", "remove")
_MOST = 64  # tasks in one question
_BYTES = 1 << 50


class Question:
    """One question.

    Args:
        told: ``budget``, ``add`` (fields of tasks), ``remove`` (names); all may be left out.
        catalogue: of tasks that are known.

    Raises:
        BadRequestError: it cannot be understood.
    """

    def __init__(self, told: Mapping[str, Any], catalogue: Catalogue) -> None:
        unknown = [key for key in told if key not in _KEYS]
        if unknown:
            raise BadRequestError(f"unknown field {unknown[0]!r}; allowed are {', '.join(_KEYS)}")
        add, remove = told.get("add") or [], told.get("remove") or []
        if not isinstance(add, list) or not all(isinstance(fields, Mapping) for fields in add):
            raise BadRequestError("add: must be a list of tasks, each with its fields")
        if not isinstance(remove, list) or not all(isinstance(name, str) for name in remove):
            raise BadRequestError("remove: must be a list of names")
        if len(add) + len(remove) > _MOST:
            raise BadRequestError(f"a question is about {_MOST} tasks at most")
        self._budget = None if told.get("budget") is None else self.budget_of(told["budget"])
        self._add = [
            catalogue.spec(str(fields["name"]))
            if set(fields) == {"name"} and fields["name"] in catalogue.specs
            else catalogue.parse(fields)
            for fields in add
        ]
        names = [spec.name for spec in self._add]
        if len(set(names)) != len(names):
            raise BadRequestError("add: two tasks have one name")
        self._remove = set(remove)

    @staticmethod
    def budget_of(value: Any) -> int:
        """Bytes.

        Raises:
            BadRequestError: it is no number of bytes.
        """
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise BadRequestError(
                f"budget: must be a number of bytes, or a string such as '256MiB', not {value!r:.60}"
            )
        try:
            nbytes = parse_bytes(value, what="budget")
        except QuantityError as error:
            raise BadRequestError(str(error)) from error
        if not 0 < nbytes <= _BYTES:
            raise BadRequestError(f"budget: {value!r:.60} is no budget")
        return nbytes

    def answer(self, now: TaskSet, known: TaskSet) -> dict[str, Any]:
        """See ``interface.Gateway.what_if``.

        Args:
            now: the tasks that run.
            known: all whose networks have been measured.

        Raises:
            BadRequestError: a task to be removed does not run, or a name is taken.
        """
        running = {task.name for task in now.settings.tasks}
        gone = self._remove - running
        if gone:
            raise BadRequestError(f"remove: no task {min(gone)!r} runs")
        added = {spec.name for spec in self._add}
        left = [task for task in now.settings.tasks if task.name not in self._remove | added]
        specs = (*left, *self._add)
        if not specs:
            raise BadRequestError("remove: no task would be left")
        update: dict[str, Any] = {"tasks": specs}
        if self._budget is not None:
            update["budget"] = self._budget
        try:
            new = known.with_settings(now.settings.model_copy(update=update))
            plan = plan_of(new)
        except NarrowboatError as error:  # it cannot even be laid out
            return {"admitted": False, "reasons": [str(error)], "suggestions": [], "plan": None, "change": None}
        told = {
            "admitted": plan["admitted"],
            "reasons": plan["reasons"],
            "suggestions": plan["suggestions"],
            "plan": plan,
            "change": None,
        }
        if plan["admitted"] and all(spec.blocks is None for spec in specs):
            try:
                change = plan_change(now, new)
            except NarrowboatError as error:
                return {**told, "admitted": False, "reasons": [str(error)]}
            told["change"] = {"pause_us": change.pause, "allowed_us": change.allowed}
        return told
