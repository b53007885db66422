"""Long work beside the event loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from narrowboat.serve.aside import aside


def steps(ended: threading.Event, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            sum(range(100))
    finally:
        ended.set()


def test_its_result_and_its_error_come_back() -> None:
    assert asyncio.run(aside(lambda: 7)) == 7
    with pytest.raises(KeyError, match="x"):
        asyncio.run(aside(lambda: {}["x"]))


def test_what_takes_too_long_is_ended_at_its_next_step() -> None:
    ended = threading.Event()
    with pytest.raises(TimeoutError):
        asyncio.run(aside(lambda: steps(ended), 0.1, stoppable=True))
    assert ended.wait(5)


def test_what_nobody_waits_for_any_more_is_ended() -> None:
    ended = threading.Event()

    async def go() -> None:
        waiting = asyncio.create_task(aside(lambda: steps(ended), stoppable=True))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(go())
    assert ended.wait(5)


def test_a_thread_that_goes_on_does_not_keep_the_process() -> None:
    code = (
        "import asyncio, time\n"
        "from narrowboat.serve.aside import aside\n"
        "try:\n"
        "    asyncio.run(aside(lambda: time.sleep(60), 0.1))\n"
        "except TimeoutError:\n"
        "    print('over')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "over\n"
