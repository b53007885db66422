"""``/v1/completions``, ``/v1/chat/completions``, ``/v1/embeddings`` and ``/v1/models``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from narrowboat.errors import NoSuchTaskError
from narrowboat.serve.interface import Gateway, TaskFace
from narrowboat.serve.openai.answer import Answer, Prompt
from narrowboat.serve.openai.bodies import Shape
from narrowboat.serve.openai.embed import embed
from narrowboat.serve.openai.errors import wrong
from narrowboat.serve.openai.fields import Fields
from narrowboat.serve.openai.generate import check_length, check_letters, window_of
from narrowboat.serve.openai.jobs import Limits
from narrowboat.serve.openai.openapi import CHAT, COMPLETION, EMBEDDING, MODEL, MODELS
from narrowboat.serve.openai.room import Room, beside
from narrowboat.serve.openai.schema import ChatRequest, CompletionRequest, read_chat, read_completion, read_embedding
from narrowboat.serve.openai.streams import ClientGoneError, EventStream, unless_gone, with_errors
from narrowboat.serve.openai.tokens import Tokens

_TTFT = "x-slo-ttft-ms"
_GONE = 499  # what servers write down for a client that did not wait; nobody receives it


def router(gateway: Gateway, limits: Limits | None = None) -> APIRouter:
    """The endpoints.

    Args:
        gateway: behind them.
        limits: of what they take; the usual ones if left out.
    """
    room, made = Room(gateway, limits or Limits()), int(time.time())
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/models", openapi_extra=MODELS)
    async def models() -> Response:
        """Tasks that run text."""
        return _json({"object": "list", "data": [_model(face, made) for face in room.faces() if face.ready]})

    @routes.get("/models/{model}", openapi_extra=MODEL)
    async def model(model: str) -> Response:
        """One of them."""
        face = next((face for face in room.faces() if face.name == model), None)
        if face is None:
            raise NoSuchTaskError(
                f"there is no task {model!r} that runs text", details={"param": "model", "code": "model_not_found"}
            )
        return _json(_model(face, made))

    @routes.post("/completions", openapi_extra=COMPLETION)
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await _generation(room, request, chat=False)

    @routes.post("/chat/completions", openapi_extra=CHAT)
    async def chat_completions(request: Request) -> Response:
        """Answer in a conversation."""
        return await _generation(room, request, chat=True)

    @routes.post("/embeddings", openapi_extra=EMBEDDING)
    async def embeddings(request: Request) -> Response:
        """Embed texts."""
        fields = Fields.of_body(await request.body())
        face = room.find(fields, "embedding")
        tokens, width = await room.tokens(face), face.outputs[0].shape[-1]
        asked = read_embedding(fields, tokens.vocabulary, width, request.headers.get(_TTFT))

        async def work() -> dict[str, Any]:
            with room.pace(face).place(face.name):
                return await embed(room.jobs(face, asked.wish), face, tokens, asked)

        try:
            return _json(await unless_gone(request.receive, work()))
        except ClientGoneError:
            return Response(status_code=_GONE)

    return routes


async def _generation(room: Room, request: Request, *, chat: bool) -> Response:
    fields = Fields.of_body(await request.body())
    face = room.find(fields, "causal")
    vocabulary, header = face.outputs[0].shape[-1], request.headers.get(_TTFT)
    asked: ChatRequest | CompletionRequest = (
        read_chat(fields, vocabulary, header) if chat else read_completion(fields, vocabulary, header)
    )

    async def begin() -> Answer:
        jobs = room.jobs(face, asked.how.wish)
        tokens = await room.tokens(face)
        window = window_of(face)
        if isinstance(asked, ChatRequest):
            prompts = await _conversation(tokens, asked, window)
        else:
            prompts = await _prompts(tokens, asked, window)
        for prompt in prompts:
            check_length(len(prompt.tokens), window, "messages" if chat else "prompt")
        return Answer(face, tokens, jobs, Shape(chat, face.name, tokens), asked.how, prompts)

    async def whole() -> dict[str, Any]:
        with room.pace(face).place(face.name):
            return await (await begin()).whole()

    async def events() -> AsyncGenerator[bytes, None]:
        with room.pace(face).place(face.name):
            async with aclosing((await begin()).events()) as made:
                async for body in made:
                    yield body

    try:
        if not asked.how.stream:
            return _json(await unless_gone(request.receive, whole()))
        source = events()
        try:
            first = await unless_gone(request.receive, anext(source))
        except BaseException:
            await source.aclose()
            raise
    except ClientGoneError:
        return Response(status_code=_GONE)
    return EventStream(with_errors(first, source), room.limits.send)


async def _conversation(tokens: Tokens, asked: ChatRequest, window: int) -> list[Prompt]:
    letters = sum(len(message["content"]) + 64 for message in asked.messages)
    check_letters(letters, window, "messages")
    ids = await beside(letters, lambda: tokens.chat(asked.messages))
    if not ids:
        raise wrong("messages", "make a prompt without tokens")
    return [Prompt(ids)]


async def _prompts(tokens: Tokens, asked: CompletionRequest, window: int) -> list[Prompt]:
    found = []
    for given in asked.prompts:
        if isinstance(given, list):
            found.append(Prompt(given, tokens.decode(given) if asked.echo else ""))
            continue
        check_letters(len(given), window, "prompt")
        ids = await beside(len(given), lambda text=given: tokens.encode(text))  # type: ignore[misc]
        if not ids:  # as a text that has just begun
            ids = [token for token in (tokens.begin, *sorted(tokens.ends)) if token is not None][:1]
        if not ids:
            raise wrong("prompt", "is a text without tokens")
        found.append(Prompt(ids, given if asked.echo else ""))
    return found


def _model(face: TaskFace, created: int) -> dict[str, Any]:
    return {
        "id": face.name,
        "object": "model",
        "created": created,
        "owned_by": "narrowboat",
        "narrowboat": {
            "ready": face.ready,
            "reason": face.reason,
            "text": face.facts["text"],
            "window": face.facts.get("window"),
            "guaranteed": face.guaranteed,
            "bound_us": face.bound,
            "deadline_us": face.deadline,
            "period_us": face.period,
            "burst": face.burst,
        },
    }


def _json(told: dict[str, Any]) -> Response:
    return Response(orjson.dumps(told), media_type="application/json")
