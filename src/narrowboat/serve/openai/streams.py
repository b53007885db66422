"""Answers that are sent piece by piece, and clients that go before they have all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from narrowboat.errors import JobFailedError, RequestError
from narrowboat.serve.openai.errors import error_body

T = TypeVar("T")
log = logging.getLogger("narrowboat.serve")
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def event(told: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + orjson.dumps(told) + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The outcome of ``work``, which is cancelled if the client goes first.

    Args:
        receive: of the request, whose body has been read.
        work: anything.

    Raises:
        ClientGoneError: the client has gone.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; closes their source when the client has gone, or takes them too slowly.

    Args:
        events: as bytes.
        patience: seconds for the client to take one.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], patience: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._patience = events, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        with contextlib.suppress(ClientGoneError, OSError, TimeoutError):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for body in self._events:
                async with asyncio.timeout(self._patience):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()


async def with_errors(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """A stream that was begun, and then its rest; an error ends it, told as an event."""
    try:
        yield first
        async for body in rest:
            yield body
    except RequestError as error:
        yield event(error_body(error))
    except Exception:
        log.exception("a stream failed")
        yield event(error_body(JobFailedError("the answer could not be continued")))
    finally:
        await rest.aclose()
