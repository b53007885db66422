"""What the protocol tells of the server and its tasks; plain dictionaries, as HTTP sends them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from narrowboat import __version__
from narrowboat.errors import NotServingError
from narrowboat.serve.interface import Gateway, TaskFace
from narrowboat.serve.oip.ask import VERSION
from narrowboat.tasks.tensors import TensorSpec

NAME = "narrowboat"
EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics", "parameters")


def server() -> dict[str, Any]:
    """Name, version and extensions."""
    return {"name": NAME, "version": __version__, "extensions": list(EXTENSIONS)}


def model(face: TaskFace) -> dict[str, Any]:
    """Tensors of a task, and its contract as ``parameters``. Times in microseconds."""
    parameters: dict[str, Any] = {
        "model": face.model,
        "guaranteed": face.guaranteed,
        "takes_requests": face.takes_requests,
        "deadline_us": face.deadline,
        "period_us": face.period,
        "burst": face.burst,
    }
    if face.bound is not None:
        parameters["bound_us"] = face.bound
    return {
        "name": face.name,
        "versions": [VERSION],
        "platform": NAME,
        "inputs": [spec.as_json() for spec in face.inputs],
        "outputs": [spec.as_json() for spec in face.outputs],
        "parameters": parameters,
    }


def config(face: TaskFace) -> dict[str, Any]:
    """What holds of Triton's model configuration: exact shapes, no batching by the server."""
    return {
        "name": face.name,
        "platform": NAME,
        "backend": NAME,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [_dims(spec) for spec in face.inputs],
        "output": [_dims(spec) for spec in face.outputs],
    }


async def statistics(gateway: Gateway, faces: Iterable[TaskFace]) -> list[dict[str, Any]]:
    """Jobs that came to their end in this run. Triton's times per stage are left out: nobody measures them so.

    Raises:
        NotServingError: nothing is known yet.
    """
    feed = gateway.feed()
    try:
        hello = await anext(aiter(feed))
    finally:
        feed.close()
    if not hello.get("ticks"):
        raise NotServingError("there are no statistics yet", retry_after=1.0)
    tasks = hello["ticks"][-1]["tasks"]
    return [
        {
            "name": face.name,
            "version": VERSION,
            "inference_count": tasks[face.name]["done"],
            "execution_count": tasks[face.name]["done"],
        }
        for face in faces
        if face.name in tasks
    ]


def index(gateway: Gateway, only_ready: bool = False) -> list[dict[str, Any]]:
    """All tasks with Triton's words for their states."""
    return [
        {
            "name": face.name,
            "version": VERSION,
            "state": "READY" if face.ready else "UNAVAILABLE",
            "reason": face.reason,
        }
        for face in gateway.faces()
        if face.ready or not only_ready
    ]


def _dims(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape)}
