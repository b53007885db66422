"""What the endpoints share: the tasks that run text, their tokenizers, and their pace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from narrowboat.errors import BadRequestError, ModelError, NoSuchTaskError, NotServingError
from narrowboat.serve.interface import Gateway, TaskFace
from narrowboat.serve.openai.fields import Fields
from narrowboat.serve.openai.jobs import Jobs, Limits, Pace
from narrowboat.serve.openai.schema import Wish
from narrowboat.serve.openai.tokens import Tokens
from narrowboat.zoo.text_facts import Kind

T = TypeVar("T")
_LONG = 4096  # letters from which on a text is turned into tokens beside the event loop
_USE = {"causal": "/v1/completions and /v1/chat/completions", "embedding": "/v1/embeddings"}


class Room:
    """State of the endpoints, on the event loop's thread.

    Args:
        gateway: behind them.
        limits: of what they take.
    """

    def __init__(self, gateway: Gateway, limits: Limits) -> None:
        self.gateway, self.limits = gateway, limits
        self._tokens: dict[str, asyncio.Task[Tokens]] = {}
        self._paces: dict[str, Pace] = {}

    def faces(self) -> list[TaskFace]:
        """Tasks that run text, by name."""
        return [face for face in self.gateway.faces() if face.facts.get("text") in _USE and face.takes_requests]

    def find(self, fields: Fields, kind: Kind) -> TaskFace:
        """The task that a request names as its model.

        Raises:
            NoSuchTaskError: there is none.
            BadRequestError: it does something else.
            NotServingError: it does not run now.
        """
        name = fields.text("model")
        try:
            face = self.gateway.face(name)
        except NoSuchTaskError as error:
            details = {**error.details, "param": "model", "code": "model_not_found"}
            raise NoSuchTaskError(str(error), details=details) from error
        does = face.facts.get("text")
        if does != kind or not face.takes_requests:
            hint = f"; it serves {_USE[does]}" if does in _USE and face.takes_requests else ""
            raise BadRequestError(
                f"task {name!r} does not serve {_USE[kind]}{hint}", details={"param": "model", "code": "invalid_value"}
            )
        if not face.ready or len(face.inputs) != 2 or not face.outputs:
            reason = face.reason or "its network is not open yet"
            raise NotServingError(f"task {name!r} is not ready: {reason}", retry_after=1.0)
        return face

    def pace(self, face: TaskFace) -> Pace:
        """Of the task."""
        return self._paces.setdefault(face.name, Pace(self.limits))

    def jobs(self, face: TaskFace, wish: Wish) -> Jobs:
        """Of one request."""
        return Jobs(self.gateway, face, self.pace(face), self.limits, wish)

    async def tokens(self, face: TaskFace) -> Tokens:
        """Of the task's model, read once.

        Raises:
            BadRequestError: the model's folder has no tokenizer that can be used.
        """
        folder = str(face.facts["tokenizer"])
        if folder not in self._tokens:
            self._tokens[folder] = asyncio.create_task(asyncio.to_thread(Tokens, Path(folder)))
        try:
            return await asyncio.shield(self._tokens[folder])
        except ModelError as error:
            self._tokens.pop(folder, None)  # it may be mended
            raise BadRequestError(
                f"task {face.name!r} cannot serve text: its tokenizer cannot be used: {error}",
                details={"param": "model", "code": "invalid_value"},
            ) from error


async def beside(letters: int, work: Callable[[], T]) -> T:
    """What a text of so many letters is turned into, without holding up the event loop if they are many."""
    return work() if letters < _LONG else await asyncio.to_thread(work)
