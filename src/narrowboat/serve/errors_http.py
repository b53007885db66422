"""What was refused or went wrong, as HTTP says it: the one place where errors become answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from narrowboat.errors import BadRequestError, ForbiddenError, NoSuchTaskError, RequestError, UnauthorizedError
from narrowboat.serve.logs import log

OPENAI_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models")
OUTCOME = "narrowboat.outcome"
"""Key of a request's scope under which the log finds what became of it."""

_HTTP_TYPES: dict[int, str] = {
    400: BadRequestError.__name__,
    403: ForbiddenError.__name__,
    404: NoSuchTaskError.__name__,
    405: "MethodNotAllowedError",
    415: "UnsupportedMediaTypeError",
}


def is_openai(path: str) -> bool:
    """Whether errors on this path have OpenAI's form."""
    return path.startswith(OPENAI_PATHS)


def error_body(path: str, status: int, kind: str, message: str, details: Mapping[str, Any] | None = None) -> bytes:
    """The JSON of one error.

    Args:
        path: that was asked for; those of OpenAI's protocol have its form.
        status: of HTTP.
        kind: name of the error's class.
        message: what went wrong and what to do.
        details: for machines.
    """
    told: dict[str, Any]
    message = message.encode("utf-8", "replace").decode()  # half a surrogate pair, quoted from JSON, has no UTF-8
    if is_openai(path):
        from narrowboat.serve.openai.errors import error_body as openai_body

        error = RequestError(message, details=dict(details or {}))
        error.status = status
        told = openai_body(error)
    else:
        told = {**(details or {}), "error": message, "type": kind}
    return orjson.dumps(told, default=str, option=orjson.OPT_NON_STR_KEYS)


def error_headers(error: RequestError) -> dict[str, str]:
    """What its answer says beside the body: when to try again, and how to say who asks."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    return headers


def answer(path: str, error: RequestError) -> Response:
    """The answer to a request that was refused."""
    kind = type(error).__name__
    body = error_body(path, error.status, kind, str(error), error.details)
    return Response(body, error.status, error_headers(error), "application/json")


def unexpected(path: str, request_id: str) -> Response:
    """The answer to a request on which we failed; what happened is in the log under the id."""
    message = f"the gateway failed on this request; its log has the reason under {request_id}"
    body = error_body(path, 500, "InternalError", message, {"request_id": request_id})
    return Response(body, 500, media_type="application/json")


def install(app: FastAPI) -> None:
    """Have an app's errors answered so."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        request.scope[OUTCOME] = type(error).__name__
        return answer(request.scope["path"], error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, status = request.scope["path"], error.status_code
        message = str(error.detail)
        if status == 404 and message == "Not Found":
            message = "there is no such path; GET /openapi.json lists them"
        elif status == 405:
            message = f"{request.method} is not for this path"
        kind = _HTTP_TYPES.get(status, "InternalError" if status >= 500 else "RequestError")
        request.scope[OUTCOME] = kind
        return Response(error_body(path, status, kind, message), status, error.headers, "application/json")

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problems = error.errors()
        # What was sent is not sent back: it may be large, or secret.
        fields = [{"where": [str(part) for part in p["loc"]], "problem": p["msg"]} for p in problems]
        status = 400 if any(p["type"] == "json_invalid" for p in problems) else 422
        said = "; ".join(f"{'.'.join(f['where'])}: {f['problem']}" for f in fields[:5])
        kind = BadRequestError.__name__
        request.scope[OUTCOME] = kind
        body = error_body(request.scope["path"], status, kind, said, {"fields": fields[:50]})
        return Response(body, status, media_type="application/json")

    async def failed(request: Request, error: Exception) -> Response:
        scope = request.scope
        request_id = str(scope.get("state", {}).get("request_id", ""))
        scope[OUTCOME] = "InternalError"
        log("failed", level=logging.ERROR, error=error, id=request_id, method=request.method, path=scope["path"][:200])
        return unexpected(scope["path"], request_id)

    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
