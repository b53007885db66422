"""Events for whoever watches: each subscriber has a short queue, and one that is slow loses pictures."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from narrowboat.errors import NotServingError

_WAITING = 50  # events, of one subscriber: five seconds
_TICKS = 300  # that a new one is shown
_WHOLE = 50  # of them, the last, with their jobs and segments
_LONG: dict[str, Any] = {"jobs": [], "segments": []}


class Subscription:
    """One subscriber: see ``interface.Feed``.

    Args:
        hub: that it belongs to.
        hello: the first event.
    """

    def __init__(self, hub: Hub, hello: dict[str, Any]) -> None:
        self._hub = hub
        self._events: deque[dict[str, Any]] = deque([hello])
        self._lost = 0
        self._there = asyncio.Event()
        self._there.set()
        self._closed = False

    def put(self, event: dict[str, Any]) -> None:
        """An event; the oldest picture goes where there are too many."""
        if len(self._events) >= _WAITING:
            self._events.popleft()
            self._lost += 1
        self._events.append(event)
        self._there.set()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        while True:
            await self._there.wait()
            if self._lost:
                lost, self._lost = self._lost, 0
                yield {"event": "lost", "events": lost}
            while self._events:
                yield self._events.popleft()
            if self._closed:
                return
            self._there.clear()

    def close(self) -> None:
        """No more."""
        self._closed = True
        self._there.set()
        self._hub.leave(self)


class Hub:
    """All subscribers. Used in the event loop's thread.

    Args:
        most: subscribers at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._subscribed: set[Subscription] = set()
        self._ticks: deque[dict[str, Any]] = deque(maxlen=_TICKS)

    def subscribe(self, hello: dict[str, Any]) -> Subscription:
        """A new one; its first event is ``hello``, with the last ticks.

        Raises:
            NotServingError: too many watch already.
        """
        if len(self._subscribed) >= self._most:
            raise NotServingError(f"{self._most} watch already: that is as many as may", retry_after=10.0)
        ticks = list(self._ticks)
        shown = [{**tick, **_LONG} for tick in ticks[:-_WHOLE]] + ticks[-_WHOLE:]
        made = Subscription(self, {"event": "hello", **hello, "ticks": shown})
        self._subscribed.add(made)
        return made

    def leave(self, subscription: Subscription) -> None:
        """It does not watch any more."""
        self._subscribed.discard(subscription)

    def publish(self, event: dict[str, Any]) -> None:
        """To everybody."""
        if event["event"] == "tick":
            self._ticks.append(event)
        for each in self._subscribed:
            each.put(event)

    def forget(self) -> None:
        """The executor is another: its clock begins anew, and old ticks mean nothing."""
        self._ticks.clear()

    def close(self) -> None:
        """Nobody watches any more."""
        for each in list(self._subscribed):
            each.close()
