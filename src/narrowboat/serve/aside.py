"""Long work of pure Python beside the event loop: it can be given up, and never keeps the process from ending."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _GivenUp(BaseException):
    """Raised in a thread whose result nobody waits for."""


async def aside(work: Callable[[], T], seconds: float | None = None, *, stoppable: bool = False) -> T:
    """The result of ``work``, done in a thread of its own.

    Args:
        work: that may take long.
        seconds: after which it is given up; None for however long it takes.
        stoppable: where it is given up, or nobody waits for it any more, an exception ends it at its next step; for
            work that leaves nothing half done.

    Raises:
        TimeoutError: it took longer.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()
    over = threading.Lock()
    done = False

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        nonlocal done
        value, error = None, None
        try:
            try:
                value = work()
            except Exception as caught:
                error = caught
            with over:
                done = True
        except _GivenUp:
            return
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    thread = threading.Thread(target=run, name="narrowboat-aside", daemon=True)
    thread.start()
    try:
        async with asyncio.timeout(seconds):
            return await result
    finally:
        with over:
            if stoppable and not done and thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_GivenUp))
