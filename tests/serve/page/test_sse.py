"""The stream of events: whole, alive, and gone without a trace when its reader is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson

from narrowboat.serve.page.sse import EventStream
from serve_kit import FakeGateway, tick


class Reader:
    """An ASGI client that keeps what it is sent.

    Args:
        enough: of the body, after which it goes away.
        stuck: it takes nothing beyond the head of the answer.
    """

    def __init__(self, enough: Callable[[bytes], bool] = lambda body: False, stuck: bool = False) -> None:
        self.body, self.messages, self.gone = b"", [], asyncio.Event()
        self._enough, self._stuck = enough, stuck

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if self._stuck and message["type"] == "http.response.body":
            await asyncio.Event().wait()
        self.body += message.get("body", b"")
        if self._enough(self.body):
            self.gone.set()

    def events(self) -> list[dict[str, Any]]:
        lines = [line for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [orjson.loads(line[6:]) for line in lines]


def told(test: Callable[[FakeGateway], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test(FakeGateway())

    asyncio.run(bounded())


async def answer(stream: EventStream, reader: Reader, method: str = "GET") -> None:
    await stream({"type": "http", "method": method}, reader.receive, reader.send)


def test_events_come_in_order_with_ids_and_begin_with_hello() -> None:
    async def test(gateway: FakeGateway) -> None:
        reader = Reader(lambda body: body.count(b"data: ") == 4)
        stream = EventStream(gateway.feed())
        for number in range(3):
            gateway.push(tick(gateway, number))
        await answer(stream, reader)
        assert [event["event"] for event in reader.events()] == ["hello", "tick", "tick", "tick"]
        assert reader.body.startswith(b"retry: 1000\n\nid: 1\ndata: ")
        head = dict(reader.messages[0]["headers"])
        assert head[b"content-type"].startswith(b"text/event-stream") and head[b"cache-control"] == b"no-store"
        assert b"content-length" not in head

    told(test)


def test_silence_is_broken_by_comments() -> None:
    async def test(gateway: FakeGateway) -> None:
        reader = Reader(lambda body: body.count(b": still here\n\n") >= 3)
        await answer(EventStream(gateway.feed(), heartbeat=0.01), reader)
        assert [event["event"] for event in reader.events()] == ["hello"]

    told(test)


def test_a_reader_that_goes_frees_its_feed() -> None:
    async def test(gateway: FakeGateway) -> None:
        feed, reader = gateway.feed(), Reader()
        going = asyncio.ensure_future(answer(EventStream(feed), reader))
        while not reader.events():
            await asyncio.sleep(0)
        reader.gone.set()
        await going
        assert feed.closed and not gateway.feeds
        assert len(asyncio.all_tasks()) == 1  # this one

    told(test)


def test_a_reader_that_takes_nothing_is_given_up() -> None:
    async def test(gateway: FakeGateway) -> None:
        feed = gateway.feed()
        await answer(EventStream(feed, patience=0.05), Reader(stuck=True))
        assert feed.closed
        assert len(asyncio.all_tasks()) == 1

    told(test)


def test_the_stream_ends_with_the_gateway() -> None:
    async def test(gateway: FakeGateway) -> None:
        reader, stream = Reader(), EventStream(gateway.feed())
        gateway.set_state("stopped", "asked to")
        await answer(stream, reader)
        assert reader.events()[-1]["state"] == "stopped"
        assert reader.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}

    told(test)


def test_the_stream_ends_with_its_feed_and_a_cancelled_answer_leaves_nothing() -> None:
    async def test(gateway: FakeGateway) -> None:
        feed, reader = gateway.feed(), Reader()
        going = asyncio.ensure_future(answer(EventStream(feed), reader))
        while not reader.events():
            await asyncio.sleep(0)
        feed.close()
        await going
        other = gateway.feed()
        going = asyncio.ensure_future(answer(EventStream(other), Reader()))
        await asyncio.sleep(0.01)
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)
        assert other.closed and len(asyncio.all_tasks()) == 1

    told(test)
