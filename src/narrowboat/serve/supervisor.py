"""Keeps an executor running: starts it, hears of its end, starts it again with what was in force, and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from narrowboat.errors import ExecutorError, NarrowboatError
from narrowboat.serve.aside import aside
from narrowboat.tasks.live import LiveRun
from narrowboat.tasks.task_set import TaskSet

_KEPT = 2000  # jobs, and segments, of the executor's own record: the gateway keeps a longer window
_PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds before each further start
_CALM = 60.0  # seconds of running after which starts are counted anew
_SILENT = 10.0  # seconds without a picture, after which the executor is taken to hang


class Supervisor:
    """One executor at a time. Used in the event loop's thread.

    Args:
        on_tick: called with every picture.
        on_state: called with "serving" or "restarting", and why in words.

    Attributes:
        live: the run; None while there is none.
    """

    def __init__(self, on_tick: Callable[[dict[str, Any]], None], on_state: Callable[[str, str], None]) -> None:
        self._on_tick, self._on_state = on_tick, on_state
        self.live: LiveRun | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending = False
        self._last_tick = 0.0

    async def start(self, task_set: TaskSet) -> None:
        """Start the first; from then on there is always one.

        Raises:
            NarrowboatError: it cannot run the tasks.
        """
        await self._begin(task_set)
        self._task = asyncio.create_task(self._keep(), name="narrowboat-supervisor")

    async def _begin(self, task_set: TaskSet) -> None:
        making = asyncio.ensure_future(aside(lambda: self._make(task_set)))
        try:
            live = await asyncio.shield(making)
        except asyncio.CancelledError:  # told to end while it starts: it must not be left behind, nor waited for
            making.add_done_callback(_close)
            raise
        loop = asyncio.get_running_loop()
        for descriptor in live.descriptors:
            loop.add_reader(descriptor, live.collect)
        self.live, self._last_tick = live, time.monotonic()

    def _make(self, task_set: TaskSet) -> LiveRun:
        return LiveRun(task_set, None, self._ticked, keep=_KEPT, collected=True)

    def _ticked(self, told: dict[str, Any]) -> None:
        self._last_tick = time.monotonic()
        self._on_tick(told)

    async def _keep(self) -> None:
        """Wait for the end of each run, and begin the next."""
        failed = 0
        while not self._ending:
            live, began = self.live, time.monotonic()
            assert live is not None
            why = await self._end_of(live)
            task_set = live.task_set
            if not self._ending:
                self._on_state("restarting", why)
            await self._discard(live)
            if self._ending:
                return
            failed = 0 if time.monotonic() - began > _CALM else failed + 1
            while not self._ending and self.live is None:
                await asyncio.sleep(_PAUSES[min(failed, len(_PAUSES)) - 1] if failed else 0.0)
                try:
                    await self._begin(task_set)
                except NarrowboatError as error:
                    failed += 1
                    self._on_state("restarting", f"the executor cannot be started: {error}")
            if self.live is not None:
                self._on_state("serving", "")

    async def _end_of(self, live: LiveRun) -> str:
        """Why a run has ended."""
        waiting = asyncio.wrap_future(live.ended)
        while True:
            done, _ = await asyncio.wait([waiting], timeout=1.0)
            if done:
                break
            if time.monotonic() - self._last_tick > _SILENT and not self._ending:
                live.kill()
                with contextlib.suppress(ExecutorError):
                    await waiting
                return f"the executor said nothing for {_SILENT:g} s and was ended"
        error = waiting.exception()
        return str(error) if error is not None else "the executor ended by itself"

    async def _discard(self, live: LiveRun) -> None:
        loop = asyncio.get_running_loop()
        for descriptor in live.descriptors:
            loop.remove_reader(descriptor)
        self.live = None
        await aside(live.close)

    async def stop(self) -> None:
        """End the run, jobs under way first, and start none anew."""
        self._ending = True
        live = self.live
        if live is not None and live.running:
            live.stop()
        if self._task is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._task), timeout=_SILENT)
            except TimeoutError:
                await self.kill()

    async def kill(self) -> None:
        """End everything now."""
        self._ending = True
        if self.live is not None:
            self.live.kill()
        if self._task is not None:
            done, _ = await asyncio.wait([self._task], timeout=_SILENT)
            if not done:
                self._task.cancel()
                await asyncio.wait([self._task], timeout=_SILENT)


def _close(making: asyncio.Future[LiveRun]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()
