"""Whatever the published document allows to be asked: no answer of the gateway's own fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from narrowboat.serve.app import make_rooms
from narrowboat.serve.settings import ServeSettings
from serve_kit import FakeGateway, tick

schemathesis = pytest.importorskip("schemathesis")

NAMES = {"model": "identity", "version": "1", "name": "colours"}
GATEWAY = FakeGateway()
GATEWAY.push(tick(GATEWAY, 1))
ROOMS = make_rooms(GATEWAY, ServeSettings(Path("tasks.yaml")))
SCHEMA = (
    schemathesis.openapi.from_asgi("/openapi.json", ROOMS)
    .exclude(path="/v1/events")  # it has no end
    .exclude(path_regex="repository/models")  # after which there is nothing to ask of
)


@SCHEMA.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_that_is_described_ends_in_an_error_of_ours(case: Any) -> None:
    from schemathesis.checks import not_a_server_error

    if hash(repr(case.body)) % 4:  # else paths are as odd as they are made
        case.path_parameters = {name: NAMES.get(name, value) for name, value in (case.path_parameters or {}).items()}
    case.call_and_validate(checks=[not_a_server_error])
