"""What the live page is made of, over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from narrowboat.serve.interface import Gateway, TaskFace
from narrowboat.serve.page.document import Document, document
from narrowboat.serve.page.sse import EventStream
from narrowboat.serve.page.trial import Trials

_EVENTS: dict[str, Any] = {
    "responses": {
        "200": {
            "description": "Server-sent events without an end. `data` is JSON with its kind in `event`: hello, tick, "
            "plan, state, lost. A comment every ten seconds says that the connection lives.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        "503": {"description": "Too many subscribers."},
    }
}
_TRY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/png", "image/jpeg", "image/bmp", "image/webp")
        },
    },
    "responses": {
        "200": {
            "description": "The most probable classes, or a summary of the outputs; and what became of the deadline.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        **{
            str(status): {"description": why}
            for status, why in {
                400: "No image, or the task takes none.",
                404: "No such task.",
                413: "The file or its pixels are more than the limit.",
                429: "Beyond the task's contract.",
                500: "The network failed on this image.",
                503: "The gateway or the task does not serve now.",
                504: "The deadline passed before the work began.",
            }.items()
        },
    },
}


def router(gateway: Gateway, page: Document | None = None) -> APIRouter:
    """``/``, ``/v1/events``, ``/v1/tasks`` and ``/v1/tasks/{name}/try``.

    Args:
        gateway: in front of which they are.
        page: answered to ``/``; that of one machine if left out.
    """
    routes = APIRouter(tags=["page"])
    trials = Trials(gateway)
    page = page or document()

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def shell(request: Request) -> Response:
        headers = page.headers()
        if request.headers.get("if-none-match") == page.etag:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(page.packed, headers={**headers, "Content-Encoding": "gzip"}, media_type="text/html")
        return Response(page.body, headers=headers, media_type="text/html")

    @routes.get("/v1/events", summary="What happens, as it happens", response_class=Response, openapi_extra=_EVENTS)
    async def events() -> Response:
        return EventStream(gateway.feed())

    @routes.get("/v1/tasks", summary="All tasks that run or could be loaded")
    async def tasks() -> Response:
        return _json({"tasks": [face_told(face) for face in gateway.faces()]})

    @routes.post(
        "/v1/tasks/{name}/try",
        summary="Try a task with an image file",
        response_class=Response,
        openapi_extra=_TRY,
    )
    async def attempt(name: str, request: Request) -> Response:
        return _json(await trials.image(name, request))

    return routes


def face_told(face: TaskFace) -> dict[str, Any]:
    """A face as JSON. Times in microseconds; of the facts what the page needs, and no path of this machine."""
    return {
        "name": face.name,
        "model": face.model,
        "ready": face.ready,
        "reason": face.reason,
        "takes_requests": face.takes_requests,
        "guaranteed": face.guaranteed,
        "inputs": [spec.as_json() for spec in face.inputs],
        "outputs": [spec.as_json() for spec in face.outputs],
        "bound_us": face.bound,
        "deadline_us": face.deadline,
        "period_us": face.period,
        "burst": face.burst,
        "takes": _takes(face.facts),
        "labels": len(face.facts.get("labels") or ()),
    }


def _takes(facts: Mapping[str, Any]) -> str:
    if facts.get("tokenizer"):
        return "embedding" if facts.get("text") == "embedding" else "text"
    return "image" if facts.get("image") else "tensors"


def _json(told: Any) -> Response:
    return Response(orjson.dumps(told), media_type="application/json", headers={"Cache-Control": "no-store"})
