"""A task tried by hand: an image goes in as a file, labels or a summary of the outputs come out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request

from narrowboat.errors import BadRequestError, TooLargeError
from narrowboat.serve.interface import Gateway, TaskFace
from narrowboat.serve.page.images import MAX_BYTES, prepare
from narrowboat.tasks.tensors import RawTensor, TensorSpec

TOP = 5
_DECODERS = 2  # images decoded at a time: each may take MAX_PIXELS in memory
_FLOATS = ("FP16", "BF16", "FP32", "FP64")
_NUMPY = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}


class Trials:
    """Tries tasks with images, a few at a time.

    Args:
        gateway: that runs them.
        limit: bytes of an image file.
    """

    def __init__(self, gateway: Gateway, limit: int = MAX_BYTES) -> None:
        self._gateway, self._limit = gateway, limit
        self._decoding = asyncio.Semaphore(_DECODERS)

    async def image(self, name: str, request: Request) -> dict[str, Any]:
        """The image in the request's body, through a task.

        Returns:
            What :meth:`Reply.parameters` tells, and ``"top": [{"label", "index", "probability"}]`` where the first
            output is ``[1, N]``; otherwise ``"outputs": [{"name", "datatype", "shape", "min", "mean", "max"}]``.

        Raises:
            RequestError: the task takes no image, the file is none or too large, or whatever ``infer`` raises.
        """
        face = self._gateway.face(name)
        spec, facts = image_input(face)
        data = await self._body(request)
        async with self._decoding:
            tensor = await asyncio.to_thread(prepare, data, spec.shape, facts["mean"], facts["std"])
        reply = await self._gateway.infer(name, {spec.name: tensor})
        told = best(reply.outputs[0], face.facts.get("labels") or ()) if reply.outputs else None
        found = {"top": told} if told else {"outputs": [summary(*output) for output in reply.outputs]}
        return {**found, **reply.parameters()}

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind != "application/octet-stream":
            raise BadRequestError(f"send the image as it is, with its own content type; {kind!r} is none of an image")
        taken = bytearray()
        try:
            async for chunk in request.stream():
                taken += chunk
                if len(taken) > self._limit:
                    raise TooLargeError(f"the image file is larger than {self._limit:,} bytes")
        except ClientDisconnect as error:
            raise BadRequestError("the client went away before it had sent the image") from error
        return bytes(taken)


def image_input(face: TaskFace) -> tuple[TensorSpec, Mapping[str, Any]]:
    """The input of a task that takes an image, and the image's mean and std.

    Raises:
        BadRequestError: it takes something else.
    """
    facts = face.facts.get("image")
    spec = face.inputs[0] if len(face.inputs) == 1 else None
    if not facts or spec is None or spec.datatype != "FP32" or len(spec.shape) != 4 or spec.shape[:2] != (1, 3):
        raise BadRequestError(
            f"task {face.name!r} takes no image: that is one FP32 input of shape [1, 3, height, width] and a model "
            "that says its mean and std"
        )
    return spec, facts


def best(output: tuple[TensorSpec, RawTensor], labels: Sequence[str]) -> list[dict[str, Any]] | None:
    """The most probable classes, if an output is scores of at least two (``[1, N]``); None otherwise.

    Scores are put through softmax, unless they are probabilities already.
    """
    _, tensor = output
    if len(tensor.shape) != 2 or tensor.shape[0] != 1 or tensor.shape[1] < 2 or tensor.datatype not in _FLOATS:
        return None
    scores = numbers(tensor).astype(np.float64)
    if not np.isfinite(scores).all():
        return None
    if scores.min() < 0 or abs(scores.sum() - 1) > 1e-3:
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
    order = np.argsort(-scores, kind="stable")[:TOP]
    return [
        {
            "label": str(labels[k]) if k < len(labels) else f"class {k}",
            "index": int(k),
            "probability": float(scores[k]),
        }
        for k in order
    ]


def summary(spec: TensorSpec, tensor: RawTensor) -> dict[str, Any]:
    """An output in few numbers; those that are not finite are left out of them."""
    found = numbers(tensor)
    finite = found[np.isfinite(found)].astype(np.float64)
    told: dict[str, Any] = {"name": spec.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    for what, of in (("min", np.min), ("mean", np.mean), ("max", np.max)):
        told[what] = float(of(finite)) if finite.size else None
    return told


def numbers(tensor: RawTensor) -> np.ndarray[Any, Any]:
    """All elements, flat."""
    if tensor.datatype == "BF16":  # the upper half of a float32
        return (np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(tensor.data, _NUMPY[tensor.datatype])
