"""Server-sent events: what a feed tells, to one reader, for as long as both are there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from narrowboat.serve.interface import Feed

HEARTBEAT = 10.0  # seconds of silence after which a comment goes out, so that a dead connection is noticed
PATIENCE = 15.0  # seconds for which a reader may take nothing
RETRY = 1_000  # milliseconds after which a reader that lost its connection should come back
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


class EventStream(Response):
    """The answer that goes on: ``id`` and ``data`` (JSON, with its kind in ``event``) for every event of a feed.

    It ends with the feed, after the state "stopped", when the reader is gone, or when the reader takes nothing for
    ``patience``. Whatever ends it, the feed is closed. Nothing is kept for a slow reader but what the feed keeps.

    Args:
        feed: of this reader.
        heartbeat: seconds.
        patience: seconds.
    """

    def __init__(self, feed: Feed, heartbeat: float = HEARTBEAT, patience: float = PATIENCE) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._feed, self._heartbeat, self._patience = feed, heartbeat, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                async with contextlib.aclosing(self._chunks(gone)) as chunks:
                    async for chunk in chunks:
                        await asyncio.wait_for(self._send(send, chunk), self._patience)
            await asyncio.wait_for(self._send(send, b"", more=False), self._patience)
        except TimeoutError:
            pass  # the server closes a connection whose answer was left unfinished
        finally:
            self._feed.close()
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    @staticmethod
    async def _send(send: Send, chunk: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def _chunks(self, gone: asyncio.Future[None]) -> AsyncGenerator[bytes, None]:
        yield b"retry: %d\n\n" % RETRY
        events, number = aiter(self._feed), 0
        following: asyncio.Future[dict[str, Any] | None] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(_next(events))
                both: set[asyncio.Future[Any]] = {gone, following}
                done, _ = await asyncio.wait(both, timeout=self._heartbeat, return_when=asyncio.FIRST_COMPLETED)
                if gone in done:
                    return
                if following not in done:
                    yield b": still here\n\n"
                    continue
                event, following = following.result(), None
                if event is None:
                    return
                number += 1
                yield b"id: %d\ndata: %s\n\n" % (number, orjson.dumps(event))
                if event.get("event") == "state" and event.get("state") == "stopped":
                    return
        finally:
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)


async def _next(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(events, None)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
