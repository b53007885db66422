"""The short way of inference answers as the long one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from narrowboat.errors import BeyondContractError
from narrowboat.serve.app import make_rooms
from narrowboat.serve.express import Express
from narrowboat.serve.oip.routes import infer_handler
from narrowboat.serve.settings import ServeSettings
from serve_kit import FakeGateway

X = {"name": "INPUT0", "datatype": "FP32", "shape": [1, 8], "data": [0.5] * 8}


class Reached:
    """Fails if the long way is taken."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError(f"{scope['path']} went the long way")


def clients(gateway: FakeGateway) -> tuple[TestClient, TestClient]:
    """Of the long way, and of the short one alone."""
    rooms = make_rooms(gateway, ServeSettings(Path("tasks.yaml")))
    short = Express(Reached(), infer_handler(gateway))
    return TestClient(rooms, raise_server_exceptions=False), TestClient(short)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/models/identity/infer", {"id": "7", "inputs": "right"}),
        ("/v2/models/identity/versions/1/infer", {"inputs": "right"}),
        ("/v2/models/identity/versions/9/infer", {"inputs": "right"}),
        ("/v2/models/nobody/infer", {"inputs": "right"}),
        ("/v2/models/a%20b%C3%A9/infer", {"inputs": "right"}),
        ("/v2/models/spare/infer", {"inputs": "right"}),
        ("/v2/models/identity/infer", {"inputs": []}),
        ("/v2/models/identity/infer", {"inputs": [{**X, "shape": [1, 9]}]}),
        ("/v2/models/identity/infer", "{"),
    ],
)
def test_both_ways_answer_the_same(path: str, body: Any) -> None:
    gateway = FakeGateway()
    spec = gateway.face("identity").inputs[0]
    right = {**X, "name": spec.name, "shape": list(spec.shape), "datatype": spec.datatype, "data": [1] * 8}
    if isinstance(body, dict) and body["inputs"] == "right":
        body = {**body, "inputs": [{**right, "data": [1] * (spec.nbytes // 4)}]}
    told = [
        client.post(path, content=body if isinstance(body, str) else json.dumps(body)) for client in clients(gateway)
    ]
    assert told[0].status_code == told[1].status_code and told[0].content == told[1].content
    assert told[0].headers["content-type"] == told[1].headers["content-type"]


def test_refusals_carry_the_same_headers() -> None:
    gateway = FakeGateway()
    gateway.fail("identity", *(BeyondContractError("too soon", retry_after=2.5) for _ in range(2)))
    spec = gateway.face("identity").inputs[0]
    body = {"inputs": [{"name": spec.name, "datatype": "FP32", "shape": list(spec.shape), "data": [1] * 8}]}
    told = [client.post("/v2/models/identity/infer", json=body) for client in clients(gateway)]
    assert [answer.status_code for answer in told] == [429, 429]
    assert [answer.headers["retry-after"] for answer in told] == ["3", "3"]


def test_everything_else_goes_the_long_way() -> None:
    long_way = TestClient(Express(Reached(), infer_handler(FakeGateway())))
    for method, path in (
        ("GET", "/v2/models/identity/infer"),
        ("POST", "/v2/models/identity"),
        ("POST", "/v2/x/infer"),
    ):
        with pytest.raises(AssertionError, match="the long way"):
            long_way.request(method, path)
