"""One text: token after token, each a job of the task."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from narrowboat.errors import JobFailedError, NotServingError
from narrowboat.serve.interface import TaskFace
from narrowboat.serve.openai.errors import wrong
from narrowboat.serve.openai.jobs import Jobs
from narrowboat.serve.openai.sampling import Sampler, Scored, scored
from narrowboat.serve.openai.schema import Generation
from narrowboat.serve.openai.spoken import Characters, Stops
from narrowboat.serve.openai.tokens import Tokens
from narrowboat.tasks.tensors import RawTensor

_LETTERS = 256  # that one token stands for at most, but for texts that nobody means

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """What one job brought.

    Attributes:
        text: that may be sent now; of this token, and of earlier ones that were held back.
        before: letters of the text before this token, held back ones too.
        scored: the token by the model's own logits, and the most probable ones; None where nobody asked, or where the
            token ended the text and is not part of it.
        finish: why nothing follows; None if something does.
    """

    text: str
    before: int
    scored: tuple[Scored, list[Scored]] | None
    finish: Finish | None


def window_of(face: TaskFace) -> int:
    """Tokens that one job takes.

    Raises:
        NotServingError: it is not known yet what the task takes.
    """
    if len(face.inputs) != 2 or not face.outputs:
        raise NotServingError(f"task {face.name!r} is not ready: {face.reason or 'its network is not open'}")
    return face.inputs[0].shape[1]


def check_letters(letters: int, window: int, param: str) -> None:
    """A text that cannot fit the window is refused before it is turned into tokens, which would take its time.

    Raises:
        BadRequestError: it has more letters than that many tokens can stand for.
    """
    if letters > window * _LETTERS:
        check_length(-(-letters // _LETTERS), window, param)


def check_length(count: int, window: int, param: str) -> None:
    """Refuse what is longer than a window, in OpenAI's words.

    Raises:
        BadRequestError: it is.
    """
    if count > window:
        raise wrong(
            param,
            f"This model's maximum context length is {window} tokens. However, your {param} resulted in {count} "
            f"tokens. Please reduce the length of the {param}.",
            "context_length_exceeded",
        )


async def generate(
    jobs: Jobs, face: TaskFace, tokens: Tokens, prompt: list[int], how: Generation, stream: int
) -> AsyncIterator[Step]:
    """The steps of one text; the last one says why it ends.

    Args:
        jobs: of the request.
        face: of the task.
        tokens: of its model.
        prompt: from one token up to the window.
        how: to generate; ``most`` at least 1.
        stream: number of the text in its request.

    Raises:
        RequestError: see :meth:`Jobs.run`.
    """
    window = window_of(face)
    row = np.full((1, window), tokens.padding, np.int64)
    row[0, : len(prompt)] = prompt
    room = window - len(prompt) + 1  # the token behind a full window can still be computed
    most = room if how.most is None else min(how.most, room)
    characters, stops, sampler = Characters(tokens.decode, prompt), Stops(how.stops), Sampler(how.sampling, stream)
    said = 0
    for count in range(1, most + 1):
        last = len(prompt) + count - 2
        logits = await _logits(jobs, face, row, last)
        token = sampler.take(logits)
        if token in tokens.ends:
            text, stopped = stops.add(characters.end())
            yield Step(text if stopped else text + stops.end(), said, None, "stop")
            return
        if last + 1 < window:
            row[0, last + 1] = token
        before = said
        more = characters.add(token) if count < most else characters.add(token) + characters.end()
        said += len(more)
        text, stopped = stops.add(more)
        finish: Finish | None = "stop" if stopped else "length" if count == most else None
        if finish == "length":
            text += stops.end()
        about = None if how.logprobs is None else scored(logits, token, how.logprobs)
        yield Step(text, before, about, finish)
        if stopped:
            return


async def _logits(jobs: Jobs, face: TaskFace, row: np.ndarray[Any, Any], last: int) -> np.ndarray[Any, Any]:
    """Of the token after position ``last``, [vocabulary] float32."""
    ids, at = face.inputs
    inputs = {
        ids.name: RawTensor("INT64", tuple(row.shape), row.astype("<i8").tobytes()),
        at.name: RawTensor("INT64", (1,), np.array([last], "<i8").tobytes()),
    }
    logits = floats(await jobs.run(inputs))
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        raise JobFailedError(f"task {face.name!r} gave logits that are no numbers")
    return logits


def floats(reply: Any) -> np.ndarray[Any, Any]:
    """The row that a text task gives, [width] float32."""
    _, tensor = reply.outputs[0]
    return np.frombuffer(tensor.data, "<f4")
