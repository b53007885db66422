"""What one request for an inference asks for, and what its parameters mean, whichever way it came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from narrowboat.errors import BadRequestError, NoSuchTaskError, NotServingError
from narrowboat.serve.interface import Gateway, TaskFace
from narrowboat.tasks.tensors import RawTensor, TensorSpec

VERSION = "1"  # of every task
_LONGEST = 1 << 62  # microseconds
# What stock clients may send and narrowboat cannot do: told, rather than left out silently.
_UNSUPPORTED = {
    "sequence_id": "tasks keep no state between requests",
    "shared_memory_region": "send the tensor's bytes with the request",
    "classification": "ask for the output itself",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that the client wants.

    Attributes:
        place: among the outputs of the task.
        binary: as bytes after the JSON text, rather than as numbers in it.
    """

    place: int
    binary: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        inputs: all that the task takes.
        wanted: in the order of the answer.
        id: to echo.
        timeout: microseconds after which the answer is of no use, or None.
        priority: 0 is none.
    """

    inputs: dict[str, RawTensor]
    wanted: tuple[Wanted, ...]
    id: str
    timeout: int | None
    priority: int


def served(gateway: Gateway, name: str, version: str = "") -> TaskFace:
    """The face of a task, of the only version there is. Raises NoSuchTaskError."""
    face = gateway.face(name)
    if version not in ("", VERSION):
        raise NoSuchTaskError(f"task {name!r} has no version {version[:40]!r}; there is {VERSION} only")
    return face


def ready(gateway: Gateway, face: TaskFace) -> bool:
    """Whether requests to the task are let in now."""
    return gateway.state == "serving" and face.ready and face.takes_requests


def asked_of(face: TaskFace) -> dict[str, TensorSpec]:
    """What a request to the task has to bring.

    Raises:
        BadRequestError: it takes no requests.
        NotServingError: it does not run.
    """
    if not face.ready:
        raise NotServingError(f"task {face.name!r} does not run: {face.reason or 'it is not loaded'}")
    if not face.takes_requests:
        raise BadRequestError(f"task {face.name!r} takes its inputs itself; it has no `input: {{queue: NAME}}`")
    return {spec.name: spec for spec in face.inputs}


def find_output(face: TaskFace, name: Any, taken: Iterable[Wanted]) -> int:
    """The place of an output that is asked for by name. Raises BadRequestError: there is none, or asked for twice."""
    for place, spec in enumerate(face.outputs):
        if spec.name == name:
            if any(other.place == place for other in taken):
                raise BadRequestError(f"output {name!r} is asked for twice")
            return place
    names = ", ".join(spec.name for spec in face.outputs)
    raise BadRequestError(f"task {face.name!r} has no output {str(name)[:80]!r}; it has {names}")


def check_names(face: TaskFace, given: Mapping[str, Any]) -> None:
    """All inputs have to be there. Raises BadRequestError."""
    missing = [spec.name for spec in face.inputs if spec.name not in given]
    if missing:
        raise BadRequestError(f"task {face.name!r}: input {', '.join(missing)} is missing")


def refuse_unsupported(parameters: Mapping[str, Any], where: str) -> None:
    """Raises BadRequestError where a parameter asks for what cannot be done."""
    for name in _UNSUPPORTED.keys() & parameters.keys():
        if parameters[name]:
            raise BadRequestError(f"{where}: {name} is not supported; {_UNSUPPORTED[name]}")


def whole(value: Any, name: str) -> int:
    """A parameter that is a whole number from 0, as an integer or its digits. Raises BadRequestError."""
    if type(value) is str and len(value) <= 20 and value.isascii() and value.isdigit():
        value = int(value)
    if type(value) is not int or not 0 <= value <= _LONGEST:
        raise BadRequestError(f"parameter {name} has to be a whole number from 0, not {str(value)[:80]!r}")
    return value


def timeout_of(parameters: Mapping[str, Any]) -> int | None:
    """The parameter ``timeout`` in microseconds; None where it is left out, or 0, which is Triton's default."""
    return whole(parameters["timeout"], "timeout") or None if "timeout" in parameters else None


def priority_of(parameters: Mapping[str, Any]) -> int:
    """The parameter ``priority``; 0 where it is left out."""
    return whole(parameters["priority"], "priority") if "priority" in parameters else 0


def sooner(*timeouts: int | None) -> int | None:
    """The shortest of those that are given."""
    return min((timeout for timeout in timeouts if timeout is not None), default=None)
