"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

from narrowboat.errors import BadRequestError, RequestError

_TYPES = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"),
    404: ("invalid_request_error", "model_not_found"),
    409: ("conflict_error", "conflict"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "service_unavailable"),
    504: ("timeout_error", "deadline_exceeded"),
}


def error_body(error: RequestError) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``; ``param`` and ``code`` may come with its details."""
    usual = "server_error" if error.status >= 500 else "invalid_request_error"
    kind, code = _TYPES.get(error.status, (usual, None))
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": error.details.get("param"),
            "code": error.details.get("code", code),
        }
    }


def wrong(param: str, message: str, code: str = "invalid_value") -> BadRequestError:
    """A field that cannot be used."""
    return BadRequestError(f"{param}: {message}", details={"param": param, "code": code})
