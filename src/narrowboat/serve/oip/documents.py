"""What OpenAPI says of the routes: bodies and answers by hand, since the routes read their requests themselves."""

from __future__ import annotations

from typing import Any

from narrowboat.serve.oip.ask import VERSION
from narrowboat.tasks.tensors import SIZES

_TEXT: dict[str, Any] = {"type": "string"}
_WHOLE: dict[str, Any] = {"type": "integer", "minimum": 0}
_NAMED: dict[str, Any] = {"type": "object", "required": ["name"]}
_SHAPE: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_DATATYPE: dict[str, Any] = {"type": "string", "enum": list(SIZES)}
_NUMBERS: dict[str, Any] = {"type": "array", "items": {}, "description": "Flat, or nested as the shape says."}
_ERROR = {
    "type": "object",
    "required": ["error", "type"],
    "properties": {"error": {**_TEXT, "description": "What is wrong, and what to do."}, "type": _TEXT},
}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": _TEXT,
        "shape": _SHAPE,
        "datatype": _DATATYPE,
        "data": _NUMBERS,
        "parameters": {
            "type": "object",
            "properties": {"binary_data_size": {**_WHOLE, "description": "Bytes that follow the JSON text."}},
        },
    },
}
_ASK = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": _TEXT,
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {
            "type": "array",
            "items": {
                **_NAMED,
                "properties": {
                    "name": _TEXT,
                    "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
                },
            },
        },
        "parameters": {
            "type": "object",
            "properties": {
                "timeout": {
                    "description": "Microseconds after which the answer is of no use; 0 is none.",
                    "anyOf": [_WHOLE, {"type": "string", "pattern": "^[0-9]{1,18}$"}],
                },
                "priority": {
                    "description": "Among requests that are promised nothing, smaller first; 0 is none.",
                    "anyOf": [_WHOLE, {"type": "string", "pattern": "^[0-9]{1,18}$"}],
                },
                "binary_data_output": {"type": "boolean"},
            },
        },
    },
}
_ANSWER = {
    "type": "object",
    "required": ["model_name", "model_version", "parameters", "outputs"],
    "properties": {
        "model_name": _TEXT,
        "model_version": _TEXT,
        "id": _TEXT,
        "parameters": {
            "type": "object",
            "description": "Times in microseconds.",
            "required": ["admitted", "deadline_us", "response_us", "met"],
            "properties": {
                "admitted": {"type": "boolean"},
                "bound_us": _WHOLE,
                "deadline_us": _WHOLE,
                "response_us": _WHOLE,
                "met": {"type": "boolean"},
            },
        },
        "outputs": {"type": "array", "items": _TENSOR},
    },
}
_METADATA = {
    "type": "object",
    "required": ["name", "versions", "platform", "inputs", "outputs"],
    "properties": {
        "name": _TEXT,
        "versions": {"type": "array", "items": _TEXT},
        "platform": _TEXT,
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {"type": "array", "items": _TENSOR},
        "parameters": {"type": "object"},
    },
}
_STATISTICS = {
    "type": "object",
    "required": ["model_stats"],
    "properties": {"model_stats": {"type": "array", "items": _NAMED}},
}
_LOAD = {
    "type": "object",
    "properties": {
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "config": {
                    **_TEXT,
                    "contentMediaType": "application/json",
                    "description": "JSON text: fields of a task as in tasks.yaml.",
                }
            },
        }
    },
}
_PLAN = {"type": "object", "description": "The plan in force, as of `GET /v1/plan`."}
_INDEX = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "version", "state", "reason"],
        "properties": {"name": _TEXT, "version": _TEXT, "state": _TEXT, "reason": _TEXT},
    },
}
_READY = {"type": "object", "required": ["ready"], "properties": {"ready": {"type": "boolean"}, "state": _TEXT}}
_WRONG = {
    400: "It cannot be understood",
    401: "No token",
    403: "No right",
    404: "No such task",
    408: "Sent too slowly",
    409: "Refused; nothing was changed",
    413: "Too large",
    429: "Beyond the contract; Retry-After says when",
    500: "The network failed on this input",
    503: "Not serving, or the task is not admitted",
    504: "Expired before it was done; dropped",
}
_READS = (401, 403, 429)
_BODIES = (400, *_READS, 408, 413)
_INFER = (*_BODIES, 404, 500, 503, 504)
_CHANGES = (*_BODIES, 404, 409, 503)
# Of each handler: what it does, the schema of its body (or None), of its answer, and what can go wrong.
_ROUTES: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any], tuple[int, ...]]] = {
    "infer": ("One inference", _ASK, _ANSWER, _INFER),
    "model_ready": ("Whether requests to a task are let in", None, _READY, (*_READS, 404, 503)),
    "model_config": ("A task in the words of Triton's model configuration", None, _NAMED, (*_READS, 404)),
    "model_statistics": ("Jobs of a task that were done", None, _STATISTICS, (*_READS, 404, 503)),
    "statistics": ("Jobs of all tasks that were done", None, _STATISTICS, (*_READS, 503)),
    "model_metadata": ("Tensors and contract of a task", None, _METADATA, (*_READS, 404)),
    "server_live": ("The gateway is up", None, {"type": "object"}, ()),
    "server_ready": ("Requests are let in", None, _READY, (503,)),
    "server_metadata": ("Name, version, extensions", None, _NAMED, _READS),
    "repository_index": (
        "All tasks that run or could",
        {"type": "object", "properties": {"ready": {"type": "boolean"}}},
        _INDEX,
        _BODIES,
    ),
    "repository_load": ("Ask for admission of a task", _LOAD, _PLAN, _CHANGES),
    "repository_unload": ("Go on without a task", {"type": "object"}, _PLAN, _CHANGES),
}


def documented(name: str, path: str) -> dict[str, Any]:
    """Arguments of ``add_api_route`` that describe a handler.

    Args:
        name: of the handler.
        path: with its parameters in braces.
    """
    summary, body, answer, wrong = _ROUTES[name]
    extra: dict[str, Any] = {"parameters": _path(path)}
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if name == "infer":
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
        extra["parameters"] += [
            _header("Inference-Header-Content-Length", "Bytes of the JSON text, where tensors follow it.", _WHOLE),
            _header("X-SLO-TTFT-MS", "As the parameter timeout, in milliseconds.", {"type": "number"}),
        ]
    if body is not None:
        extra["requestBody"] = {"required": name == "infer", "content": {"application/json": {"schema": body}}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": summary, "content": content}}
    for status in wrong:
        shape = _READY if name in ("model_ready", "server_ready") and status == 503 else _ERROR
        responses[status] = {"description": _WRONG[status], "content": {"application/json": {"schema": shape}}}
    return {"summary": summary, "responses": responses, "openapi_extra": extra}


def _path(path: str) -> list[dict[str, Any]]:
    found = []
    if "{model}" in path:
        found.append({"name": "model", "in": "path", "required": True, "schema": _TEXT})
    if "{version}" in path:
        version = {"type": "string", "enum": [VERSION]}
        found.append({"name": "version", "in": "path", "required": True, "schema": version})
    return found


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}
