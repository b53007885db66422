"""Errors as HTTP says them, in one form."""

from __future__ import annotations

import pytest

from narrowboat import errors
from narrowboat.errors import BeyondContractError, ConflictError, RequestError, UnauthorizedError
from narrowboat.serve.errors_http import answer
from serve_guard_kit import ask, on_a_loop, serving


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RequestError)],
    ids=lambda kind: kind.__name__,
)
def test_every_refusal_has_its_status_and_its_name(kind: type[RequestError]) -> None:
    import json

    told = answer("/v2/models/x/infer", kind("why", retry_after=0.2, details={"bound_us": 5}))
    assert told.status_code == kind.status and told.headers["retry-after"] == "1"
    assert json.loads(told.body) == {"error": "why", "type": kind.__name__, "bound_us": 5}
    spoken = json.loads(answer("/v1/chat/completions", kind("why")).body)["error"]
    assert spoken["message"] == "why" and {"type", "code", "param"} <= set(spoken)


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.4, "1"), (1.2, "2"), (7.0, "7")])
def test_when_to_try_again_is_whole_seconds_rounded_up(seconds: float, header: str) -> None:
    assert answer("/", BeyondContractError("", retry_after=seconds)).headers["retry-after"] == header


def test_details_never_hide_the_message() -> None:
    import json

    told = json.loads(answer("/", ConflictError("why", details={"error": "x", "type": "y"})).body)
    assert told == {"error": "why", "type": "ConflictError"}


def test_who_is_unauthorized_is_told_how_to_say_who_asks() -> None:
    assert answer("/", UnauthorizedError("")).headers["www-authenticate"] == "Bearer"
    assert "retry-after" not in answer("/", UnauthorizedError("")).headers


def test_text_that_has_no_utf_8_can_be_quoted() -> None:
    assert answer("/", ConflictError("half a pair \ud800")).status_code == 409


def test_an_app_answers_all_its_errors_so() -> None:
    async def main() -> None:
        async with serving() as served:
            for method, path, status, kind in (
                ("GET", "/none", 404, "NoSuchTaskError"),
                ("POST", "/v2/models/none/infer", 404, "NoSuchTaskError"),
                ("DELETE", "/v1/plan", 405, "MethodNotAllowedError"),
                ("GET", "/v1/number?value=x", 422, "BadRequestError"),
                ("GET", "/v1/number", 422, "BadRequestError"),
                ("GET", "/v1/broken", 500, "InternalError"),
            ):
                told = await ask(served.port, method, path, body=b"")
                assert (told.status, told.json()["type"]) == (status, kind), path
                assert told.headers["content-type"] == "application/json" and told.json()["error"]
            assert (await ask(served.port, "DELETE", "/v1/plan")).headers["allow"] == "GET"
            spoken = await ask(served.port, "GET", "/v1/models")
            assert (spoken.status, spoken.headers["retry-after"]) == (429, "2")
            assert spoken.json()["error"]["message"] == "too soon"

    on_a_loop(main())
