"""Embeddings: one job for each text, in order."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from narrowboat.errors import JobFailedError
from narrowboat.serve.interface import TaskFace
from narrowboat.serve.openai.bodies import Usage
from narrowboat.serve.openai.errors import wrong
from narrowboat.serve.openai.generate import check_length, check_letters, floats, window_of
from narrowboat.serve.openai.jobs import Jobs
from narrowboat.serve.openai.room import beside
from narrowboat.serve.openai.schema import EmbeddingRequest
from narrowboat.serve.openai.tokens import Tokens
from narrowboat.tasks.tensors import RawTensor


async def embed(jobs: Jobs, face: TaskFace, tokens: Tokens, request: EmbeddingRequest) -> dict[str, Any]:
    """The answer to ``POST /v1/embeddings``.

    Args:
        jobs: of the request.
        face: of the task.
        tokens: of its model.
        request: what is asked.

    Raises:
        BadRequestError: a text is empty, or longer than the window; nothing was computed then.
        RequestError: see :meth:`Jobs.run`.
    """
    window = window_of(face)
    rows: list[list[int]] = []
    for given in request.inputs:
        if not isinstance(given, list):
            check_letters(len(given), window, "input")
        row = given if isinstance(given, list) else await _encode(tokens, given)
        check_length(len(row), window, "input")
        if not row:
            raise wrong("input", "holds a text without tokens")
        rows.append(row)
    usage = Usage(prompt=sum(map(len, rows)))
    data = []
    for index, row in enumerate(rows):
        vector = await _vector(jobs, face, tokens, row, window)
        told = base64.b64encode(vector.tobytes()).decode() if request.base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": told})
    told_usage = usage.told(jobs.told())
    del told_usage["completion_tokens"]
    return {
        "object": "list",
        "data": data,
        "model": face.name,
        "usage": told_usage,
        "narrowboat": told_usage["narrowboat"],
    }


async def _encode(tokens: Tokens, text: str) -> list[int]:
    return await beside(len(text), lambda: tokens.encode(text))


async def _vector(jobs: Jobs, face: TaskFace, tokens: Tokens, row: list[int], window: int) -> np.ndarray[Any, Any]:
    ids, mask = np.full((1, window), tokens.padding, "<i8"), np.zeros((1, window), "<i8")
    ids[0, : len(row)], mask[0, : len(row)] = row, 1
    inputs = {
        spec.name: RawTensor("INT64", (1, window), given.tobytes())
        for spec, given in zip(face.inputs, (ids, mask), strict=True)
    }
    vector = floats(await jobs.run(inputs))
    if not np.isfinite(vector).all():
        raise JobFailedError(f"task {face.name!r} gave an embedding that is no numbers")
    return vector
