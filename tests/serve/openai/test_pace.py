"""Tokens keep the task's contract, and clients that go or wait too long leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest

from narrowboat.errors import BeyondContractError, ExpiredError, JobFailedError, NotServingError
from narrowboat.serve.openai.jobs import Limits, Pace
from narrowboat.serve.openai.streams import EventStream
from serve_openai_kit import Talk, app_of, served


@pytest.fixture
def strict(talk: Talk) -> Iterator[openai.OpenAI]:
    """A server that answers one request of a task at once, and lets nobody wait for long."""
    limits = Limits(requests=1, wait=0.3, send=5.0)
    with (
        served(app_of(talk.gateway, limits)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=20) as client,
    ):
        yield client


class Refusing:
    """The gateway's ``infer``, refusing jobs by their number."""

    def __init__(self, talk: Talk, refuse: Callable[[int], Exception | None]) -> None:
        self._infer, self._refuse, self._gateway = talk.gateway.infer, refuse, talk.gateway
        self.tries = 0

    async def __call__(self, name: str, inputs: Any, **more: Any) -> Any:
        self.tries += 1
        if error := self._refuse(self.tries):
            raise error
        return await self._infer(name, inputs, **more)

    def __enter__(self) -> Refusing:
        self._gateway.infer = self  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *_: object) -> None:
        del self._gateway.infer  # type: ignore[method-assign]


def create(client: openai.OpenAI, **more: Any) -> Any:
    return client.completions.create(model="talk", prompt="x", temperature=0, **{"max_tokens": 40, **more})


def soon(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_jobs_refusal_is_the_clients(talk: Talk, client: openai.OpenAI, stream: bool) -> None:
    talk.gateway.fail("talk", BeyondContractError("the next may come in 1.4 s", retry_after=1.4))
    with pytest.raises(openai.RateLimitError) as seen:
        create(client, stream=stream)
    assert seen.value.status_code == 429 and seen.value.response.headers["retry-after"] == "2"
    assert seen.value.code == "rate_limit_exceeded" and len(talk.gateway.asked) == 1


def test_the_stock_client_tries_again_by_itself(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("a boat")
    talk.gateway.fail("talk", BeyondContractError("too soon", retry_after=0.01))
    assert create(client.with_options(max_retries=1)).choices[0].text == "a boat"


@pytest.mark.parametrize("stream", [False, True])
def test_later_jobs_wait_for_their_turn(talk: Talk, client: openai.OpenAI, stream: bool) -> None:
    talk.say("a narrowboat in the rain")
    with Refusing(talk, lambda n: BeyondContractError("too soon", retry_after=0.02) if n % 3 else None) as door:
        door.tries = 2  # the first one is let in
        begun = time.monotonic()
        given = create(client, stream=stream)
        text = "".join(chunk.choices[0].text for chunk in given) if stream else given.choices[0].text
    assert text == "a narrowboat in the rain"
    assert door.tries - 2 == 3 * len(talk.speaker.script) - 2
    assert time.monotonic() - begun >= 0.02 * 2 * (len(talk.speaker.script) - 1)


def test_texts_at_once_share_the_contract_and_all_end(talk: Talk) -> None:
    """A bucket of one token a period, as the executor has it."""
    period, free = 0.01, 0.0

    def bucket(_: int) -> Exception | None:
        nonlocal free
        now = time.monotonic()
        if now < free:
            return BeyondContractError("too soon", retry_after=free - now)
        free = now + period
        return None

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{talk.url}/v1", api_key="x", max_retries=0) as client:

            async def one() -> Any:
                while True:  # the first job may be refused
                    with contextlib.suppress(openai.RateLimitError):
                        return await client.completions.create(model="talk", prompt="x", max_tokens=12, temperature=0)
                    await asyncio.sleep(period / 3)

            return await asyncio.gather(*(one() for _ in range(4)))

    talk.speaker.say([40])
    with Refusing(talk, bucket) as door:
        begun = time.monotonic()
        made = asyncio.run(run())
    assert [len(one.choices[0].text) for one in made] == [12] * 4
    assert time.monotonic() - begun >= period * 47
    assert door.tries < 47 * 20, "they wait, and do not knock all the time"


def test_a_job_that_waits_too_long_ends_the_text(talk: Talk, strict: openai.OpenAI) -> None:
    def refuse(number: int) -> Exception | None:
        return BeyondContractError("too soon", retry_after=0.1) if number > 2 else None

    talk.say("a narrowboat in the rain")
    with Refusing(talk, refuse) as door, pytest.raises(openai.RateLimitError):
        create(strict)
    assert 3 < door.tries < 9
    talk.say("a narrowboat in the rain")
    with Refusing(talk, refuse):
        pieces = []
        with pytest.raises(openai.APIError, match="too soon") as seen:
            for chunk in create(strict, stream=True):
                pieces.append(chunk.choices[0].text)
    assert pieces and seen.value.code == "rate_limit_exceeded"
    talk.say("a")
    assert create(strict).choices[0].text == "a"  # its place is free again


def test_too_many_at_once_are_refused(talk: Talk, strict: openai.OpenAI) -> None:
    talk.say("a boat a boat a boat a boat")
    talk.gateway.delay("talk", math.inf)
    with httpx.Client(base_url=str(strict.base_url), timeout=20) as other:
        body = {"model": "talk", "prompt": "x", "stream": True}
        with pytest.raises(httpx.ReadTimeout):
            other.post("completions", json=body, timeout=0.5)  # and goes
    assert soon(lambda: talk.gateway.running == 0), "a client that goes before its first token stops its job"
    talk.gateway.delay("talk", 0.5)
    with strict.completions.with_streaming_response.create(model="talk", prompt="x", stream=True) as response:
        lines = response.iter_lines()  # kept: a reader that is dropped closes the connection
        next(lines)
        with pytest.raises(openai.RateLimitError) as seen:
            create(strict)
        assert "most at once" in seen.value.message and seen.value.response.headers["retry-after"] == "1"
    talk.gateway.delay("talk", 0)
    talk.say("a")

    def free() -> bool:
        try:
            return bool(create(strict).choices)
        except openai.RateLimitError:
            return False

    assert soon(free)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_stops_its_text_at_once(talk: Talk, client: openai.OpenAI, stream: bool) -> None:
    talk.speaker.say([40])
    talk.gateway.delay("talk", 0.05)
    before = talk.gateway.cancelled
    host, port = talk.url.removeprefix("http://").split(":")
    body = b'{"model":"talk","prompt":"x","max_tokens":40,"stream":%s}' % str(stream).lower().encode()
    with socket.create_connection((host, int(port))) as raw:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        raw.sendall(head + body)
        assert soon(lambda: len(talk.gateway.asked) >= 3)
    assert soon(lambda: talk.gateway.cancelled == before + 1, 5)
    jobs = len(talk.gateway.asked)
    time.sleep(0.2)
    assert len(talk.gateway.asked) == jobs < 40 and talk.gateway.running == 0


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ExpiredError("over"), 504, "deadline_exceeded"),
        (JobFailedError("bad"), 500, "internal_error"),
        (NotServingError("restarting", retry_after=2), 503, "service_unavailable"),
    ],
)
def test_errors_have_their_status_before_and_their_event_after_the_first_token(
    talk: Talk, client: openai.OpenAI, error: Exception, status: int, code: str
) -> None:
    for stream in (False, True):
        talk.gateway.fail("talk", error)
        with pytest.raises(openai.APIStatusError) as seen:
            create(client, stream=stream)
        assert (seen.value.status_code, seen.value.code) == (status, code)
    talk.say("a narrowboat in the rain")
    with Refusing(talk, lambda number: error if number == 3 else None):
        with pytest.raises(openai.APIError) as told:
            list(create(client, stream=True))
        assert told.value.code == code


def test_the_first_job_has_the_clients_deadline(talk: Talk, client: openai.OpenAI) -> None:
    def timeouts(**more: Any) -> list[int | None]:
        talk.say("ab")
        talk.gateway.asked.clear()
        create(client, **more)
        assert {asked.priority for asked in talk.gateway.asked} == {more.get("extra_body", {}).get("priority", 0)}
        return [asked.timeout for asked in talk.gateway.asked]

    assert set(timeouts()) == {None}
    first, *rest = timeouts(extra_headers={"x-slo-ttft-ms": "2500.5"})
    assert first is not None and 2_000_000 < first <= 2_500_500 and set(rest) == {None}
    first, *rest = timeouts(extra_body={"timeout": 900_000, "priority": 3}, extra_headers={"x-slo-ttft-ms": "5000"})
    assert first is not None and 500_000 < first <= 900_000 and set(rest) == {None}
    with pytest.raises(openai.APIStatusError) as seen:
        create(client, extra_body={"timeout": 1})
    assert (seen.value.status_code, seen.value.code) == (504, "deadline_exceeded")
    for header in ("soon", "-1", "0", "nan", "1e99"):
        with pytest.raises(openai.BadRequestError) as bad:
            create(client, extra_headers={"x-slo-ttft-ms": header})
        assert bad.value.param == "x-slo-ttft-ms"


def test_missed_deadlines_are_counted(talk: Talk, client: openai.OpenAI) -> None:
    from dataclasses import replace

    infer = talk.gateway.infer

    async def late(name: str, inputs: Any, **more: Any) -> Any:
        made = await infer(name, inputs, **more)
        return replace(made, met=len(talk.gateway.asked) != 2, response=25_000 if len(talk.gateway.asked) == 2 else 10)

    talk.say("abcd")
    talk.gateway.infer = late  # type: ignore[method-assign]
    try:
        told = create(client).model_extra["narrowboat"]
    finally:
        del talk.gateway.infer  # type: ignore[method-assign]
    assert (told["missed"], told["worst_response_us"]) == (1, 25_000)


def test_turns_are_a_period_apart() -> None:
    pace = Pace(Limits())
    assert [pace.turn(10.0, 0.02, 0.1) for _ in range(3)] == pytest.approx([10.02, 10.12, 10.22])
    assert pace.turn(20.0, 0.02, 0.1) == pytest.approx(20.02)
    assert pace.turn(20.5, 0.0, 0.1) > 20.5


def test_a_client_that_does_not_take_what_it_is_sent_is_given_up() -> None:
    async def run() -> list[str]:
        seen: list[str] = []

        async def events() -> Any:
            try:
                for _ in range(100):
                    yield b"data: x\n\n"
            finally:
                seen.append("closed")

        async def send(message: Any) -> None:
            seen.append(message["type"])
            if message.get("body"):
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        await asyncio.wait_for(EventStream(events(), patience=0.05)({}, receive, send), 5)
        return seen

    assert asyncio.run(run()) == ["http.response.start", "http.response.body", "closed"]
