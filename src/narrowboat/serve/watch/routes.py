"""GET /metrics, GET /v1/trace and GET /v1/guarantee."""

from __future__ import annotations

import math
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from narrowboat.errors import BadRequestError, BeyondContractError, NoSuchTaskError, NotServingError
from narrowboat.serve.interface import Gateway
from narrowboat.serve.watch.spans import NoTracer
from narrowboat.serve.watch.trace_file import pieces
from narrowboat.serve.watch.watch import Watch
from narrowboat.tasks.record import Record

_SECONDS = 10.0  # of a trace, if it is not said
_FILE = 'attachment; filename="narrowboat-trace.json"'
_JSON: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}}}}
_QUERY = {
    "name": "seconds",
    "in": "query",
    "required": False,
    "description": "how far back, up to what is kept",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600, "default": _SECONDS},
}
_RUN = {
    "name": "run",
    "in": "query",
    "required": False,
    "description": "`before`: of the executor that ended with the last restart",
    "schema": {"type": "string", "enum": ["now", "before"], "default": "now"},
}


def router(gateway: Gateway, watch: Watch | None = None) -> APIRouter:
    """The routes.

    Args:
        gateway: in front of which they are.
        watch: the gateway's; its attribute ``watch`` if left out.
    """
    seen: Watch = watch or getattr(gateway, "watch", None) or Watch(tracer=NoTracer())
    routes = APIRouter(tags=["watch"])
    writing: set[str] = set()

    @routes.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}},
    )
    async def metrics(request: Request) -> Response:
        text, content_type = seen.metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type, "cache-control": "no-store"})

    @routes.get(
        "/v1/guarantee",
        summary="Whether the promise stands, and what broke it",
        response_class=Response,
        responses=_JSON,
    )
    async def guarantee(request: Request) -> Response:
        told: dict[str, Any] = {**seen.premises.as_json(), "state": gateway.state}
        told["valid"] = told["valid"] and gateway.state == "serving"
        return Response(orjson.dumps(told), media_type="application/json", headers={"cache-control": "no-store"})

    @routes.get(
        "/v1/trace",
        summary="What happened lately, for ui.perfetto.dev and `narrowboat tasks conform`",
        response_class=Response,
        responses=_JSON,
        openapi_extra={"parameters": [_QUERY, _RUN]},
    )
    async def trace(request: Request) -> Response:
        seconds, before = _seconds(request.query_params.get("seconds")), _before(request.query_params.get("run"))
        if writing:
            raise BeyondContractError("another trace is being written; one at a time", retry_after=1.0)
        record: Record = seen.window.record(seconds, before=True) if before else gateway.record(seconds)
        if not record.setup:
            if before:
                raise NoSuchTaskError("the executor was never started anew: there is no run before this one")
            raise NotServingError("nothing has run yet", retry_after=1.0)
        writing.add("one")
        try:
            text = await run_in_threadpool(lambda: b"".join(pieces(record)))
        finally:
            writing.clear()
        return Response(text, media_type="application/json", headers={"content-disposition": _FILE})

    return routes


def _seconds(told: str | None) -> float:
    if told is None:
        return _SECONDS
    try:
        seconds = float(told)
    except ValueError:
        raise BadRequestError(f"seconds is a number, not {told[:40]!r}") from None
    if not (math.isfinite(seconds) and 0 < seconds <= 3600):
        raise BadRequestError("seconds is a number over 0 and up to 3600")
    return seconds


def _before(told: str | None) -> bool:
    if told not in (None, "now", "before"):
        raise BadRequestError(f"run is `now` or `before`, not {told[:40]!r}")
    return told == "before"
