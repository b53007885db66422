"""A load generator in a process of its own: HTTP/1.1 on kept connections, every answer checked.

    python benchmarks/serving_kit/load_client.py < plan.json > figures.json

Open loop: requests go out at their times whatever has become of those before; one that finds no connection free waits
here, and its time counts from then. Closed loop: every connection sends the next when it has its answer.
"""

from __future__ import annotations

import array
import asyncio
import base64
import gc
import itertools
import json
import re
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, cast

import orjson

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving_kit.asks import at
from serving_kit.spread import spread

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEAD = re.compile(rb"\r\ninference-header-content-length: *(\d+)", re.IGNORECASE)
_RESPONSE = re.compile(rb'"response_us": *(\d+)')
_MET = re.compile(rb'"met": *(true|false)')
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Tally:
    """What became of a stream's requests.

    Attributes:
        sent: requests that were written.
        ok: answered with 200 and the right bytes.
        wrong: answered with 200 and others.
        unmet: whose answers say that the deadline was missed.
        lost: whose connections ended before their answers.
        hung: that had none after the time that a client waits.
        statuses: of HTTP.
    """

    def __init__(self, stream: dict[str, Any], port: int) -> None:
        self.name, self.rate = stream["name"], stream["rate"]
        pairs = [[base64.b64decode(part) for part in pair] for pair in stream["pairs"]]
        self._pairs = itertools.cycle([(at(request, port), answer) for request, answer in pairs])
        self._right = getattr(self, "_" + stream["check"])
        self.sent = self.ok = self.wrong = self.unmet = self.lost = self.hung = 0
        self.statuses: dict[int, int] = {}
        self.latencies: list[float] = []
        self.refusals: list[float] = []
        self.beside: list[float] = []
        self.lags: list[float] = []

    def next(self) -> tuple[bytes, bytes]:
        """The next request and the answer that it has to get."""
        return next(self._pairs)

    def answered(self, status: int, head: bytes, body: bytes, answer: bytes, took: float) -> None:
        """An answer, after so many microseconds."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status != 200:
            self.refusals.append(took)
            return
        if self._right(head, body, answer):
            self.ok += 1
        else:
            self.wrong += 1
        self.latencies.append(took)
        if told := _RESPONSE.search(body):
            self.beside.append(took - int(told[1]))
        if (met := _MET.search(body)) and met[1] == b"false":
            self.unmet += 1

    @staticmethod
    def _bytes(head: bytes, body: bytes, answer: bytes) -> bool:
        told = _HEAD.search(head)
        return told is not None and body[int(told[1]) :] == answer

    @staticmethod
    def _oip(head: bytes, body: bytes, answer: bytes) -> bool:
        return array.array("f", _flat(orjson.loads(body)["outputs"][0]["data"])).tobytes() == answer

    @staticmethod
    def _litserve(head: bytes, body: bytes, answer: bytes) -> bool:
        return array.array("f", orjson.loads(body)["y"]).tobytes() == answer

    def as_json(self, seconds: float) -> dict[str, Any]:
        """The figures; times in microseconds."""
        return {
            "sent": self.sent,
            "ok": self.ok,
            "wrong": self.wrong,
            "unmet": self.unmet,
            "lost": self.lost,
            "hung": self.hung,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "rate": round(self.ok / seconds, 1),
            "latency_us": spread(self.latencies),
            "refusal_us": spread(self.refusals),
            "beside_response_us": spread(self.beside),
            "behind_us": spread(self.lags),
        }


def _flat(data: list[Any]) -> list[float]:
    while data and isinstance(data[0], list):
        data = [value for row in data for value in row]
    return data


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.number = next(load.numbers)
        self._got = bytearray()
        self._need: int | None = None
        self.tally: Tally | None = None
        self.answer = b""
        self.since = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only

    def send(self, tally: Tally, since: float) -> None:
        """Write the next request of a stream, whose time counts from ``since``."""
        assert self.transport is not None
        request, self.answer = tally.next()
        self.tally, self.since = tally, since
        tally.sent += 1
        self._load.note(self, "sent")
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Some of an answer."""
        got = self._got
        got += data
        if self._need is None:
            end = got.find(b"\r\n\r\n")
            if end < 0:
                return
            told = _LENGTH.search(got, 0, end)
            self._end = end + 4
            self._need = self._end + (int(told[1]) if told else 0)
        if len(got) < self._need or self.tally is None:
            return
        head, body = bytes(got[: self._end]), bytes(got[self._end : self._need])
        tally, self.tally, self._need = self.tally, None, None
        got.clear()
        status = int(head[9:12])
        tally.answered(status, head, body, self.answer, (time.perf_counter() - self.since) * 1e6)
        self._load.note(self, status)
        if _CLOSES.search(head):
            assert self.transport is not None
            self.transport.close()
        else:
            self._load.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        """It has ended, with or without an answer."""
        tally, self.tally = self.tally, None
        if tally is not None:
            tally.lost += 1
            self._load.note(self, "lost")
        self._load.gone(self)


class Load:
    """One load.

    Args:
        plan: ``host``, ``port``, ``connections``, ``seconds``, ``timeout``, ``streams``; ``keep`` for a log of it all.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.tallies = [Tally(stream, plan["port"]) for stream in plan["streams"]]
        self.log: list[list[Any]] = []
        self.numbers = itertools.count()
        self._all: set[Connection] = set()
        self._idle: list[Connection] = []
        self._waiting: deque[tuple[Tally, float]] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._refused = 0
        self._ends = False
        self._begun = 0.0
        closed = [tally for tally in self.tallies if tally.rate is None]
        self._closed = itertools.cycle(closed) if closed else None

    def note(self, connection: Connection, what: Any) -> None:
        """For the log: Unix seconds, which connection, what."""
        if self.plan.get("keep"):
            self.log.append([round(time.time(), 6), connection.number, what])

    def free(self, connection: Connection) -> None:
        """A connection has nothing to do."""
        if self._waiting:
            tally, since = self._waiting.popleft()
            connection.send(tally, since)
        elif self._closed is not None and not self._ends:
            connection.send(next(self._closed), time.perf_counter())
        else:
            self._idle.append(connection)

    def gone(self, connection: Connection) -> None:
        """A connection has ended; another takes its place."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if not self._ends:
            task = asyncio.get_running_loop().create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._ends:
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self.plan["host"], self.plan["port"]
                )
            except OSError:
                self._refused += 1
                await asyncio.sleep(0.02)
                continue
            self._all.add(connection)
            self.free(connection)
            return

    async def run(self) -> dict[str, Any]:
        """All of it; the figures."""
        plan = self.plan
        paced = [tally for tally in self.tallies if tally.rate is not None]
        closed, self._closed = self._closed, None
        await asyncio.gather(*(self._open() for _ in range(plan["connections"])))
        self._closed = closed
        gc.collect()
        gc.freeze()
        gc.disable()
        watching = asyncio.create_task(self._watch())
        began = time.time()
        self._begun = time.perf_counter()
        if self._closed is not None:
            idle, self._idle = self._idle, []
            for connection in idle:
                self.free(connection)
        paces = [asyncio.create_task(self._pace(tally)) for tally in paced]
        await asyncio.sleep(plan["seconds"])
        self._ends = True
        await asyncio.gather(*paces)
        seconds = time.perf_counter() - self._begun
        while any(connection.tally for connection in self._all) or self._waiting:
            await asyncio.sleep(0.01)
        watching.cancel()
        for connection in list(self._all):
            assert connection.transport is not None
            connection.transport.abort()
        return {
            "began": began,
            "seconds": round(seconds, 3),
            "connections_refused": self._refused,
            "streams": {tally.name: tally.as_json(seconds) for tally in self.tallies},
            **({"log": self.log} if plan.get("keep") else {}),
        }

    async def _pace(self, tally: Tally) -> None:
        assert tally.rate is not None
        for number in range(int(tally.rate * self.plan["seconds"])):
            due = self._begun + number / tally.rate
            while (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            now = time.perf_counter()
            tally.lags.append((now - due) * 1e6)
            if self._idle:
                self._idle.pop().send(tally, now)
            else:
                self._waiting.append((tally, now))

    async def _watch(self) -> None:
        """Give up what has had no answer for too long, sent or not."""
        while True:
            await asyncio.sleep(0.1)
            before = time.perf_counter() - self.plan["timeout"]
            while self._waiting and self._waiting[0][1] < before:
                tally, _ = self._waiting.popleft()
                tally.sent += 1
                tally.hung += 1
            for connection in list(self._all):
                if connection.tally is not None and connection.since < before:
                    connection.tally.hung += 1
                    connection.tally = None
                    self.note(connection, "hung")
                    assert connection.transport is not None
                    connection.transport.abort()


def main() -> None:
    """Read a plan, write its figures."""
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    plan = json.loads(sys.stdin.read())
    with runner:
        figures = runner.run(Load(plan).run())
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    main()
