"""The plan, what would be, and another budget, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from narrowboat.errors import ConflictError
from narrowboat.serve.app import make_rooms
from narrowboat.serve.settings import ServeSettings
from serve_kit import FakeGateway


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def client(gateway: FakeGateway) -> TestClient:
    return TestClient(make_rooms(gateway, ServeSettings(Path("tasks.yaml"))), raise_server_exceptions=False)


def test_the_plan_is_told_as_it_is(gateway: FakeGateway, client: TestClient) -> None:
    told = client.get("/v1/plan")
    assert told.status_code == 200 and told.json() == gateway.plan()
    assert told.headers["cache-control"] == "no-store"


def test_what_if_changes_nothing_and_a_budget_does(gateway: FakeGateway, client: TestClient) -> None:
    before = gateway.plan()["budget_bytes"]
    answer = client.post("/v1/admission", json={"budget": before // 2})
    assert answer.status_code == 200 and {"admitted", "reasons", "suggestions", "plan"} <= set(answer.json())
    assert gateway.plan()["budget_bytes"] == before
    assert client.put("/v1/budget", json={"budget": before + 4096}).json()["budget_bytes"] == before + 4096
    assert gateway.plan()["budget_bytes"] == before + 4096


def test_a_refusal_is_409_with_the_explanation(gateway: FakeGateway, client: TestClient) -> None:
    gateway.refuse(ConflictError("too little", details={"reasons": ["memory"], "suggestions": ["more"]}))
    answer = client.put("/v1/budget", json={"budget": "1MiB"})
    assert answer.status_code == 409
    assert answer.json() == {
        "error": "too little",
        "type": "ConflictError",
        "reasons": ["memory"],
        "suggestions": ["more"],
    }


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/budget", {}),
        ("PUT", "/v1/budget", {"budget": None}),
        ("PUT", "/v1/budget", {"budget": [1]}),
        ("PUT", "/v1/budget", {"budget": 1, "more": 2}),
        ("PUT", "/v1/budget", []),
        ("POST", "/v1/admission", {"budgets": 1}),
        ("POST", "/v1/admission", {"add": {"name": "x"}}),
        ("POST", "/v1/admission", {"add": ["x"]}),
        ("POST", "/v1/admission", {"remove": [1]}),
        ("POST", "/v1/admission", {"add": [{}] * 65}),
    ],
)
def test_what_cannot_be_understood_is_refused_by_its_field(
    client: TestClient, method: str, path: str, body: Any
) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code in (400, 422) and answer.json()["error"]
