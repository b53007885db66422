"""The fields of a request's body, each checked as it is taken; those that nobody took are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from narrowboat.errors import BadRequestError
from narrowboat.serve.openai.errors import wrong


class Fields:
    """A body, field by field. A field that is null is as good as left out.

    Args:
        told: the body.
    """

    def __init__(self, told: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in told.items() if value is not None}

    @classmethod
    def of_body(cls, body: bytes) -> Fields:
        """Of JSON.

        Raises:
            BadRequestError: it is no JSON, or no object.
        """
        try:
            told = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BadRequestError(f"the body is no JSON: {error}", details={"code": "invalid_json"}) from error
        if not isinstance(told, dict):
            raise BadRequestError("the body is no JSON object", details={"code": "invalid_json"})
        return cls(told)

    def take(self, name: str, default: Any = None) -> Any:
        """Whatever it is."""
        return self._left.pop(name, default)

    def text(self, name: str) -> str:
        """A string that has to be there."""
        value = self.take(name)
        if value is None:
            raise wrong(name, "is missing", "missing_required_parameter")
        if not isinstance(value, str):
            raise wrong(name, "is not a string", "invalid_type")
        return value

    def truth(self, name: str) -> bool:
        """True or false; false if left out."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise wrong(name, "is neither true nor false", "invalid_type")
        return value

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number within bounds."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(name, "is no whole number", "invalid_type")
        if not least <= value <= most:
            raise wrong(name, f"is {value}; from {least} to {most} is allowed")
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A number within bounds."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise wrong(name, "is no number", "invalid_type")
        if not least <= value <= most:
            raise wrong(name, f"is {value}; from {least:g} to {most:g} is allowed")
        return float(value)

    def ignore(self, *names: str) -> None:
        """Fields that change nothing, whatever they say."""
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, *neutral: Any) -> None:
        """A field that cannot be honoured, unless it says what would be done anyway."""
        value = self._left.pop(name, None)
        if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
            said = f"; {orjson.dumps(neutral[0]).decode()} is all there is" if neutral else ""
            raise wrong(name, f"is not supported here{said}", "unsupported_parameter")

    def finish(self) -> None:
        """Refuse what is left.

        Raises:
            BadRequestError: there is a field that is not known.
        """
        for name in self._left:
            raise wrong(name[:64], "is not supported here", "unsupported_parameter")


def token_numbers(value: Any, vocabulary: int, name: str) -> list[int]:
    """A list of token numbers.

    Raises:
        BadRequestError: one of them is none.
    """
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise wrong(name, f"holds {str(token)[:40]!r}; tokens are whole numbers from 0 to {vocabulary - 1}")
    return list(value)


def texts_or_tokens(value: Any, vocabulary: int, name: str, most: int) -> list[str | list[int]]:
    """A string, several, a list of token numbers, or several.

    Raises:
        BadRequestError: it is nothing of that, empty, or more than ``most``.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence) or not value:
        raise wrong(name, "is neither a string, nor a list of strings, nor tokens", "invalid_type")
    if isinstance(value[0], int):
        return [token_numbers(value, vocabulary, name)]
    if len(value) > most:
        raise wrong(name, f"holds {len(value)} texts; up to {most} are allowed at once")
    found: list[str | list[int]] = []
    for one in value:
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, list) and one:
            found.append(token_numbers(one, vocabulary, name))
        else:
            raise wrong(name, "is neither a string, nor a list of strings, nor tokens", "invalid_type")
    return found
