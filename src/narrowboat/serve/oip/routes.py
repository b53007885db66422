"""The Open Inference Protocol v2 over HTTP, with Triton's binary tensors, model repository and configuration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from narrowboat.errors import BadRequestError
from narrowboat.serve.interface import Gateway
from narrowboat.serve.oip import about
from narrowboat.serve.oip.ask import VERSION, ready, served
from narrowboat.serve.oip.body import read_body
from narrowboat.serve.oip.documents import documented
from narrowboat.serve.oip.http_infer import LENGTH_HEADER, read_ask, read_json, write_answer
from narrowboat.serve.oip.older import add_older
from narrowboat.serve.oip.repository import load_fields

MAX_BYTES = 64 << 20
Handler = Callable[[Request], Awaitable[Response]]


class _Direct(APIRoute):
    """A route whose handler takes the request as it is, so that no arguments have to be found for it."""

    def get_route_handler(self) -> Any:
        return self.endpoint


def router(gateway: Gateway, *, max_bytes: int = MAX_BYTES) -> APIRouter:
    """Routes under ``/v2``, and refusals for clients of older protocols.

    Args:
        gateway: who answers.
        max_bytes: of a body, before and after decompression.
    """
    here = _Http(gateway, max_bytes)
    made = APIRouter(route_class=_Direct, tags=["Open Inference Protocol v2"])

    def add(method: str, path: str, handler: Handler) -> None:
        made.add_api_route(
            path,
            handler,
            methods=[method],
            name=handler.__name__,
            operation_id=f"{handler.__name__}{'_version' if '{version}' in path else ''}",
            response_class=Response,
            **documented(handler.__name__, path),
        )

    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        add("POST", f"{model}/infer", here.infer)
        add("GET", f"{model}/ready", here.model_ready)
        add("GET", f"{model}/config", here.model_config)
        add("GET", f"{model}/stats", here.model_statistics)
    add("GET", "/v2/models/stats", here.statistics)
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        add("GET", model, here.model_metadata)
    add("GET", "/v2/health/live", here.server_live)
    add("GET", "/v2/health/ready", here.server_ready)
    add("GET", "/v2", here.server_metadata)
    add("POST", "/v2/repository/index", here.repository_index)
    add("POST", "/v2/repository/models/{model}/load", here.repository_load)
    add("POST", "/v2/repository/models/{model}/unload", here.repository_unload)
    add_older(made)
    return made


def infer_handler(gateway: Gateway, *, max_bytes: int = MAX_BYTES) -> Handler:
    """What answers an inference request whose ``path_params`` are known; the same as behind the route."""
    return _Http(gateway, max_bytes).infer


class _Http:
    def __init__(self, gateway: Gateway, max_bytes: int) -> None:
        self._gateway, self._max_bytes = gateway, max_bytes

    async def infer(self, request: Request) -> Response:
        face = self._face(request)
        body = await read_body(request, self._max_bytes)
        ask = read_ask(face, body, request.headers)
        reply = await self._gateway.infer(face.name, ask.inputs, timeout=ask.timeout, priority=ask.priority)
        answer, length = write_answer(face, ask, reply)
        if length is None:
            return Response(answer, media_type="application/json")
        return Response(answer, media_type="application/octet-stream", headers={LENGTH_HEADER: str(length)})

    async def server_live(self, request: Request) -> Response:
        return _json({"live": True})

    async def server_ready(self, request: Request) -> Response:
        state = self._gateway.state
        return _json({"ready": state == "serving", "state": state}, 200 if state == "serving" else 503)

    async def server_metadata(self, request: Request) -> Response:
        return _json(about.server())

    async def model_metadata(self, request: Request) -> Response:
        return _json(about.model(self._face(request)))

    async def model_ready(self, request: Request) -> Response:
        face = self._face(request)
        able = ready(self._gateway, face)
        return _json({"name": face.name, "ready": able}, 200 if able else 503)

    async def model_config(self, request: Request) -> Response:
        return _json(about.config(self._face(request)))

    async def model_statistics(self, request: Request) -> Response:
        return _json({"model_stats": await about.statistics(self._gateway, [self._face(request)])})

    async def statistics(self, request: Request) -> Response:
        return _json({"model_stats": await about.statistics(self._gateway, self._gateway.faces())})

    async def repository_index(self, request: Request) -> Response:
        told = await self._object(request)
        only_ready = told.get("ready", False)
        if type(only_ready) is not bool:
            raise BadRequestError("ready has to be true or false")
        return _json(about.index(self._gateway, only_ready))

    async def repository_load(self, request: Request) -> Response:
        name = request.path_params["model"]
        fields = load_fields(name, self._parameters(await self._object(request)))
        return _json(await self._gateway.load(name, fields))

    async def repository_unload(self, request: Request) -> Response:
        self._parameters(await self._object(request))  # unload_dependents: no task depends on another
        return _json(await self._gateway.unload(request.path_params["model"]))

    def _face(self, request: Request) -> Any:
        path = request.path_params
        return served(self._gateway, path["model"], path.get("version", VERSION))

    async def _object(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, self._max_bytes)
        told = read_json(body) if body else {}
        if type(told) is not dict:
            raise BadRequestError("the request has to be a JSON object")
        return told

    @staticmethod
    def _parameters(told: dict[str, Any]) -> dict[str, Any]:
        parameters = told.get("parameters")
        if parameters is not None and type(parameters) is not dict:
            raise BadRequestError("parameters has to be an object")
        return parameters or {}


def _json(told: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(told), status, media_type="application/json")
