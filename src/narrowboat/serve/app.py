"""All rooms under one roof: the ASGI app that a gateway serves over HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI

from narrowboat import __version__
from narrowboat.serve.errors_http import install
from narrowboat.serve.express import Express
from narrowboat.serve.guard.door import Door
from narrowboat.serve.guard.tokens import Tokens
from narrowboat.serve.interface import Gateway
from narrowboat.serve.schema import publish
from narrowboat.serve.settings import ServeSettings

_DESCRIPTION = (
    "PyTorch tasks with deadlines in a byte budget: the Open Inference Protocol v2, an OpenAI-compatible API for "
    "language models, admission, the plan, and what happens."
)


class App:
    """The rooms behind the door, as one ASGI app.

    Attributes:
        rooms: the FastAPI app.
        door: in front of it.
    """

    def __init__(self, rooms: FastAPI, door: Door, watch: Any) -> None:
        self.rooms, self.door = rooms, door
        self._entered: Callable[..., Awaitable[None]] = door
        if watch is not None:
            from narrowboat.serve.watch.observe import Observe

            self._entered = Observe(door, watch)

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """One request."""
        await self._entered(scope, receive, send)


def make_rooms(gateway: Gateway, settings: ServeSettings) -> FastAPI:
    """All routes, with errors in their one form, and nothing that guards them."""
    from narrowboat.serve.admin.routes import router as admin
    from narrowboat.serve.oip.routes import router as oip
    from narrowboat.serve.openai.routes import router as openai
    from narrowboat.serve.page.routes import router as page
    from narrowboat.serve.watch.routes import router as watch

    rooms = FastAPI(
        title="narrowboat",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # it would come from a CDN
        redoc_url=None,
        redirect_slashes=False,
    )
    rooms.include_router(oip(gateway, max_bytes=settings.limits.body_bytes))
    for router in (openai, page, watch, admin):
        rooms.include_router(router(gateway))
    install(rooms)
    publish(rooms)
    return rooms


def make_app(
    gateway: Gateway,
    settings: ServeSettings,
    tokens: Tokens | None = None,
    rooms: Callable[[Gateway, ServeSettings], FastAPI] = make_rooms,
) -> App:
    """The app of a gateway.

    Args:
        gateway: that answers; where it has a ``watch``, every request is seen by it.
        settings: of it.
        tokens: that are known; None lets everyone do everything.
        rooms: makes what is behind the door.
    """
    from narrowboat.serve.oip.routes import infer_handler

    made = rooms(gateway, settings)
    infer = infer_handler(gateway, max_bytes=settings.limits.body_bytes)
    inside = Express(made, infer) if rooms is make_rooms else made
    door = Door(inside, gateway, tokens or Tokens(), settings.limits, access_log=settings.access_log)
    return App(made, door, getattr(gateway, "watch", None))
