"""Which tasks there are: those of the file, and those of a folder that may be loaded; nothing from anywhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from narrowboat.errors import BadRequestError, NoSuchTaskError, TasksChangedError, TaskSpecError
from narrowboat.tasks.spec.load import load_tasks, tasks_from
from narrowboat.tasks.spec.schema import TaskSpec, TasksSpec, network_key
from narrowboat.zoo.text_facts import parse_text, rebase

_MOST = 256
# What a client may say of a task that is loaded: never what is read from storage or imported.
_OPEN = frozenset(
    {"period", "jitter", "contract", "deadline", "importance", "priority", "pinned", "guarantee", "overrun", "offset"}
)


class Catalogue:
    """The tasks.

    Args:
        file: ``tasks.yaml``: its tasks run from the start.
        models: a folder of files like it, whose tasks can be loaded; their own budgets mean nothing here. Paths in a
            file are meant from it, and must not lead out of the folder.

    Attributes:
        settings: of the file.
        folder: that its paths are meant from.
        specs: every task that is known, by name; paths are absolute, or meant from ``folder``.

    Raises:
        TaskSpecError: a file cannot be used, or two tasks have one name.
    """

    def __init__(self, file: Path, models: Path | None = None) -> None:
        self.file: Path | None = file
        self.folder = file.resolve().parent
        self._digest = _digest(file)
        self.settings: TasksSpec = load_tasks(file)
        self.specs: dict[str, TaskSpec] = {task.name: task for task in self.settings.tasks}
        self.first = tuple(self.specs)
        for path in sorted(models.glob("*.yaml")) if models is not None else ():
            assert models is not None
            for spec in load_tasks(path).tasks:
                if spec.name in self.specs:
                    raise TaskSpecError(f"{path}: a task {spec.name!r} is known already, from another file")
                self.specs[spec.name] = _within(spec, path, models.resolve())
        if len(self.specs) > _MOST:
            raise TaskSpecError(f"{len(self.specs)} tasks are more than the {_MOST} that a gateway serves")

    @classmethod
    def of(cls, settings: TasksSpec, folder: Path, first: Sequence[str]) -> Catalogue:
        """The same without a file, as another process describes it.

        Args:
            settings: all tasks that are known.
            folder: that their paths are meant from.
            first: names of those that run from the start.
        """
        made = cls.__new__(cls)
        made.file, made.folder, made._digest = None, folder, ""
        made.settings = settings
        made.specs = {task.name: task for task in settings.tasks}
        made.first = tuple(first)
        return made

    def everything(self) -> TasksSpec:
        """All tasks at once: what has to be measured."""
        return self.settings.model_copy(update={"tasks": tuple(self.specs.values())})

    def check_unchanged(self) -> None:
        """The file is the one that was read.

        Raises:
            TasksChangedError: it is another by now.
        """
        if self.file is None:
            return
        try:
            now = _digest(self.file)
        except TaskSpecError as error:
            raise TasksChangedError(f"{error}; the gateway goes on with what it read at its start") from error
        if now != self._digest:
            raise TasksChangedError(
                f"{self.file.name} has changed since it was read: send the gateway signal HUP to have it read again, "
                "or put it back"
            )

    def spec(self, name: str, fields: Mapping[str, Any] | None = None) -> TaskSpec:
        """A task that is known, with other fields than its description has.

        Raises:
            NoSuchTaskError: it is not known.
            BadRequestError: a field is none, or none that a client may set.
        """
        spec = self.specs.get(name)
        if spec is None:
            raise NoSuchTaskError(f"there is no task {name!r}; there are {', '.join(self.specs)}")
        if not fields:
            return spec
        closed = sorted(set(fields) - _OPEN)
        if closed:
            raise BadRequestError(
                f"{', '.join(map(repr, closed))} cannot be set by a client; {', '.join(sorted(_OPEN))} can"
            )
        plain = _plain(spec)
        if "contract" in fields:  # one or the other
            plain.pop("period", None)
            plain.pop("jitter", None)
        if "period" in fields:
            plain.pop("contract", None)
        return self.parse({**plain, **fields})

    def parse(self, fields: Mapping[str, Any]) -> TaskSpec:
        """A task by its fields, for what-if: its model is one that is known, or it is described by blocks.

        Raises:
            BadRequestError: the fields make no task, or its model is not known.
        """
        try:
            parsed = tasks_from({"budget": self.settings.budget, "tasks": [dict(fields)]}, "task").tasks[0]
        except TaskSpecError as error:
            raise BadRequestError(str(error)) from error
        if parsed.blocks is not None:
            return parsed
        models = [spec for spec in self.specs.values() if spec.blocks is None]
        if parsed.weights is None:  # those it has here
            of = next((spec.weights for spec in models if spec.model == parsed.model), None)
            parsed = parsed.model_copy(update={"weights": of})
        if network_key(parsed) not in {network_key(spec) for spec in models}:
            raise BadRequestError(
                f"model {parsed.model!r} is not known here: describe it by blocks, or name one of "
                + ", ".join(sorted({str(spec.model) for spec in models}))
            )
        return parsed

    def labels(self, name: str) -> list[str]:
        """The names of what a task tells apart; empty where there are none.

        Raises:
            TaskSpecError: the file cannot be read.
        """
        given = self.specs[name].labels
        if given is None:
            return []
        if given == "imagenet":
            from narrowboat.zoo.imagenet import class_names

            return class_names()
        try:
            return (self.folder / given).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TaskSpecError(f"task {name!r}: labels {given}: {error}") from error


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise TaskSpecError(f"cannot read {file}: {error.strerror}") from error


def _plain(spec: TaskSpec) -> dict[str, Any]:
    settings = TasksSpec.model_construct(budget=1, tasks=(spec,))
    plain: dict[str, Any] = settings.plain()["tasks"][0]
    return plain


def _within(spec: TaskSpec, path: Path, models: Path) -> TaskSpec:
    """The same with whole paths; those that lead out of the folder are refused."""
    update: dict[str, Any] = {}
    if spec.model is not None and spec.blocks is None:
        whole = update["model"] = rebase(spec.model, path.parent.resolve())
        text = parse_text(whole)
        if text is not None or ":" not in spec.model:
            _inside(spec.name, text.folder if text is not None else Path(whole), models)
        elif not spec.model.startswith("zoo:"):
            raise TaskSpecError(
                f"{path}: task {spec.name!r}: a model that may be loaded is zoo:NAME or a folder, "
                f"not {spec.model!r}: name code in the file of tasks"
            )
    for field in ("weights", "labels"):
        value = getattr(spec, field)
        if value is not None and value != "imagenet":
            update[field] = str(_inside(spec.name, path.parent / value, models))
    if spec.input is not None:
        if spec.input.generator not in (None, "example"):
            raise TaskSpecError(f"{path}: task {spec.name!r}: a generator is code: name it in the file of tasks")
        for field in ("file", "folder"):
            value = getattr(spec.input, field)
            if value is not None:
                found = str(_inside(spec.name, path.parent / value, models))
                update["input"] = spec.input.model_copy(update={field: found})
    return spec.model_copy(update=update)


def _inside(name: str, path: Path, models: Path) -> Path:
    whole = path.resolve()
    if not whole.is_relative_to(models):
        raise TaskSpecError(f"task {name!r}: {path} is outside of the models' folder {models.name}")
    return whole
