"""The published OpenAPI document: what FastAPI finds, with the bearer token and the errors of every path."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from narrowboat.serve.errors_http import is_openai
from narrowboat.serve.guard.rights import right_for

_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "400": ("The request cannot be understood.", {}),
    "401": ("No bearer token that is known.", {"WWW-Authenticate": {"schema": {"type": "string"}}}),
    "403": ("The token lacks the right, or host or origin are not allowed.", {}),
    "408": ("The request came too slowly.", {}),
    "413": ("The body is too large.", {}),
    "429": ("Too often, or too many at once.", _RETRY),
    "431": ("The header fields are too large.", {}),
    "500": ("The gateway failed; its log has the reason under `request_id`.", {}),
    "503": ("Nothing is let in now.", _RETRY),
}
_OPEN = ("500",)  # what those answer that need no token and count for nothing
_SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": {
        "type": "object",
        "description": "What was refused or went wrong; more for machines may be beside these two.",
        "required": ["error", "type"],
        "properties": {"error": {"type": "string"}, "type": {"type": "string"}},
    },
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string"},
                },
            }
        },
    },
}


def publish(app: FastAPI) -> None:
    """Have an app publish its paths so."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            app.openapi_schema = completed(found)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document with the security scheme and the errors; what a path says of itself stays."""
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(_SCHEMAS)
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "Where the gateway was given tokens."}
    }
    for path, operations in document.get("paths", {}).items():
        schema = {"$ref": f"#/components/schemas/{'OpenAIError' if is_openai(path) else 'Error'}"}
        for method, operation in operations.items():
            right = right_for(method.upper(), path)
            operation["security"] = [] if right == "open" else [{}, {"bearer": []}]
            responses = operation.setdefault("responses", {})
            for status in _OPEN if right == "open" else _ERRORS:
                said, headers = _ERRORS[status]
                told = {"description": said, "content": {"application/json": {"schema": schema}}}
                responses.setdefault(status, {**told, **({"headers": headers} if headers else {})})
    return document
