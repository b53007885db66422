"""Around every request of HTTP: which protocol it speaks, when it came, and what it was answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from narrowboat.serve.watch.watch import Watch

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]
_OPENAI = ("/v1/chat", "/v1/completions", "/v1/embeddings", "/v1/models")


class Observe:
    """ASGI middleware, outermost: ``app.add_middleware(Observe, watch=gateway.watch)`` as the last that is added.

    Args:
        app: what answers.
        watch: is told.
    """

    def __init__(self, app: _App, watch: Watch) -> None:
        self._app, self._watch = app, watch

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._watch.request(protocol_of(scope["path"]), _trace_headers(scope["headers"])) as seen:

            async def watched(message: _Message) -> None:
                if message["type"] == "http.response.start":
                    seen.code = message["status"]
                await send(message)

            await self._app(scope, receive, watched)


def protocol_of(path: str) -> str:
    """The protocol that a path belongs to, as one of ``metrics.PROTOCOLS``."""
    if path == "/v2" or path.startswith("/v2/"):
        return "oip-http"
    return "openai" if path.startswith(_OPENAI) else "http"


def _trace_headers(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name.startswith(b"trace")}
