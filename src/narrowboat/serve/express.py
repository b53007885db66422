"""Inference past the framework's routing, which takes longer than all else that the gateway does for such a request.

The routes behind it are the same and stay: they are what is documented, and what answers every other method.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from narrowboat.errors import RequestError
from narrowboat.serve.errors_http import OUTCOME, answer

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
_ROUTES = {
    False: SimpleNamespace(path="/v2/models/{model}/infer"),
    True: SimpleNamespace(path="/v2/models/{model}/versions/{version}/infer"),
}


class Express:
    """An ASGI app before another.

    Args:
        app: for everything else, and for what goes wrong unexpectedly.
        infer: answers a request whose ``path_params`` have ``model`` and, if it was given, ``version``.
    """

    def __init__(self, app: Asgi, infer: Callable[[Request], Awaitable[Response]]) -> None:
        self._app, self._infer = app, infer

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        match = None
        if scope["type"] == "http" and scope["method"] == "POST":
            match = _INFER.fullmatch(scope["path"])
        if match is None:
            await self._app(scope, receive, send)
            return
        scope["path_params"] = {name: value for name, value in match.groupdict().items() if value is not None}
        scope["route"] = _ROUTES[match["version"] is not None]
        try:
            response = await self._infer(Request(scope, receive, send))
        except RequestError as error:
            scope[OUTCOME] = type(error).__name__
            response = answer(scope["path"], error)
        await response(scope, receive, send)
