"""Events to many who watch."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from narrowboat.errors import NotServingError
from narrowboat.serve.hub import Hub, Subscription


def tick(number: int) -> dict[str, Any]:
    return {"event": "tick", "now_us": number, "jobs": [number], "segments": [number]}


async def read(feed: Subscription, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(5):
        async for event in feed:
            found.append(event)
            if len(found) == count:
                break
    return found


def test_a_new_one_is_shown_what_was_and_then_what_comes() -> None:
    async def go() -> None:
        hub = Hub(2)
        for number in range(400):
            hub.publish(tick(number))
        feed = hub.subscribe({"state": "serving"})
        hub.publish(tick(400))
        hello, following = await read(feed, 2)
        assert hello["event"] == "hello" and hello["state"] == "serving" and following["now_us"] == 400
        assert [t["now_us"] for t in hello["ticks"]] == list(range(100, 400))
        assert [bool(t["segments"]) for t in hello["ticks"]] == [False] * 250 + [True] * 50

    asyncio.run(go())


def test_one_that_is_slow_loses_the_oldest_and_is_told_how_many_and_others_lose_nothing() -> None:
    async def go() -> None:
        hub = Hub(2)
        slow, quick = hub.subscribe({}), hub.subscribe({})
        await read(slow, 1)
        await read(quick, 1)
        for number in range(120):
            hub.publish(tick(number))
            assert (await read(quick, 1))[0]["now_us"] == number
        lost, *left = await read(slow, 51)
        assert lost == {"event": "lost", "events": 70}
        assert [event["now_us"] for event in left] == list(range(70, 120))

    asyncio.run(go())


def test_as_many_as_may_watch_and_a_place_is_free_when_one_goes() -> None:
    async def go() -> None:
        hub = Hub(1)
        first = hub.subscribe({})
        with pytest.raises(NotServingError, match="1 watch already"):
            hub.subscribe({})
        first.close()
        again = hub.subscribe({})
        hub.close()
        assert [event["event"] async for event in again] == ["hello"]

    asyncio.run(go())
