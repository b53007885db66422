"""What the published OpenAPI says of these endpoints."""

from __future__ import annotations

from typing import Any

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_WHY = {
    "400": "A field is wrong, is not supported, or the prompt is longer than the window.",
    "404": "There is no such task.",
    "413": "The body is too large.",
    "429": "Beyond the task's contract, or too many requests of it at once; see Retry-After.",
    "500": "The network failed.",
    "503": "The task is not admitted, or nothing is let in now.",
    "504": "The first token's deadline passed before its job began.",
}
_JOBS = {
    "type": "object",
    "description": "How the jobs went. Times in microseconds.",
    "properties": {
        "admitted": {"type": "boolean", "description": "The deadlines are promised."},
        "bound_us": {"type": ["integer", "null"], "description": "On each job's response, by the analysis."},
        "deadline_us": {"type": "integer"},
        "worst_response_us": {"type": "integer"},
        "missed": {"type": "integer", "description": "Jobs that missed their deadline."},
        "jobs": {"type": "integer"},
    },
}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT_OR_TOKENS = {
    "oneOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1},
    ]
}
_DEADLINE = {
    "timeout": {"type": "integer", "minimum": 1, "description": "Microseconds in which the first job has to be done."},
    "priority": {"type": "integer", "minimum": 0, "description": "Among requests that are promised nothing."},
}
_GENERATION: dict[str, Any] = {
    "model": {"type": "string", "description": "The task."},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 1},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 1},
    "top_k": {"type": "integer", "minimum": -1, "description": "Among so many tokens; 0 or -1 for all."},
    "seed": {"type": "integer"},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "stop": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 16}]},
    "n": {"type": "integer", "minimum": 1, "maximum": 16},
    "stream": {"type": "boolean"},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "user": {"type": "string"},
    **_DEADLINE,
}


def _operation(
    properties: dict[str, Any] | None, required: list[str], answer: dict[str, Any], *, streams: bool = False
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    refused = {
        status: {"description": why, "content": {"application/json": {"schema": _ERROR}}}
        for status, why in _WHY.items()
        if properties is not None or status == "404"
    }
    told: dict[str, Any] = {"responses": {"200": {"description": "The answer.", "content": content}, **refused}}
    if properties is not None:
        schema = {"type": "object", "properties": properties, "required": required}
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        told["parameters"] = [
            {
                "name": "x-slo-ttft-ms",
                "in": "header",
                "required": False,
                "schema": {"type": "number", "exclusiveMinimum": 0},
                "description": "Milliseconds in which the first job has to be done.",
            }
        ]
    return told


def _object(kind: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"object": {"const": kind}, **properties}, "required": ["object"]}


_CHOICES = {"type": "array", "items": {"type": "object"}}
_USAGE = {"type": "object"}
_ONE_MODEL = _object("model", id={"type": "string"}, created={"type": "integer"}, owned_by={"type": "string"})
COMPLETION = _operation(
    {
        **_GENERATION,
        "prompt": _TEXT_OR_TOKENS,
        "max_tokens": {"type": "integer", "minimum": 0, "default": 16},
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "echo": {"type": "boolean"},
    },
    ["model"],
    _object("text_completion", choices=_CHOICES, usage=_USAGE, narrowboat=_JOBS),
    streams=True,
)
CHAT = _operation(
    {
        **_GENERATION,
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                    "content": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
                },
                "required": ["role"],
            },
        },
        "max_completion_tokens": {"type": "integer", "minimum": 1},
        "max_tokens": {"type": "integer", "minimum": 1},
        "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    },
    ["model", "messages"],
    _object("chat.completion", choices=_CHOICES, usage=_USAGE, narrowboat=_JOBS),
    streams=True,
)
EMBEDDING = _operation(
    {
        "model": {"type": "string", "description": "The task."},
        "input": _TEXT_OR_TOKENS,
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "dimensions": {"type": "integer", "description": "Those that the model has, if given."},
        "user": {"type": "string"},
        **_DEADLINE,
    },
    ["model", "input"],
    _object("list", data={"type": "array", "items": {"type": "object"}}, usage=_USAGE, narrowboat=_JOBS),
)
MODELS = _operation(None, [], _object("list", data={"type": "array", "items": _ONE_MODEL}))
MODEL = _operation(None, [], _ONE_MODEL)
