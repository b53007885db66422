"""Parameters of Triton's load: fields of a task as JSON text, and nothing that would bring files along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from narrowboat.errors import BadRequestError


def load_fields(name: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields that a load asks for instead of the description's; None where it asks for none.

    Args:
        name: of the task.
        parameters: of the request; ``config`` holds the fields, as in tasks.yaml, as JSON text.

    Raises:
        BadRequestError: another parameter, no JSON object, or the name of another task in it.
    """
    for key in parameters:
        if key.startswith("file:"):
            raise BadRequestError("models come from the configured folders only; a load cannot bring files")
        if key != "config":
            raise BadRequestError(f"load takes the parameter config, not {key[:80]!r}")
    text = parameters.get("config")
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        raise BadRequestError("config has to be JSON text: fields of a task as in tasks.yaml")
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as wrong:
        raise BadRequestError(f"config is no JSON: {wrong}") from None
    if not isinstance(fields, dict):
        raise BadRequestError("config has to be a JSON object: fields of a task as in tasks.yaml")
    if fields.pop("name", name) != name:
        raise BadRequestError(f"config names another task than {name!r}")
    return fields
