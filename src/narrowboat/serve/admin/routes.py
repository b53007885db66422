"""GET /v1/plan, POST /v1/admission and PUT /v1/budget."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from narrowboat.serve.interface import Gateway


class WhatIf(BaseModel):
    """A question; all of it may be left out."""

    model_config = ConfigDict(extra="forbid")

    budget: StrictInt | StrictStr | None = Field(None, description="Bytes, or a string such as 256MiB.")
    add: list[dict[str, Any]] = Field(
        default_factory=list,
        max_length=64,
        description="Fields of tasks as in tasks.yaml; of one that is known the name is enough.",
    )
    remove: list[str] = Field(default_factory=list, max_length=64, description="Names of tasks that run.")


class Budget(BaseModel):
    """Other bytes."""

    model_config = ConfigDict(extra="forbid")

    budget: StrictInt | StrictStr = Field(description="Bytes, or a string such as 256MiB.")


def router(gateway: Gateway) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["plan"])

    @routes.get("/v1/plan", summary="The plan in force", response_class=Response)
    async def plan() -> Response:
        return _json(gateway.plan())

    @routes.post(
        "/v1/admission",
        summary="What would be if the budget or the tasks were others; nothing is changed",
        response_class=Response,
    )
    async def admission(question: WhatIf) -> Response:
        return _json(await gateway.what_if(question.model_dump()))

    @routes.put("/v1/budget", summary="Go on within other bytes, if admission allows it", response_class=Response)
    async def budget(asked: Budget) -> Response:
        return _json(await gateway.set_budget(asked.budget))

    return routes


def _json(told: Any) -> Response:
    return Response(orjson.dumps(told), media_type="application/json", headers={"cache-control": "no-store"})
