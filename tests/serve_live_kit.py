"""A real gateway over small networks, without HTTP before it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import torch

from narrowboat.serve.gateway import LiveGateway
from narrowboat.serve.interface import Reply
from narrowboat.serve.settings import ServeSettings
from narrowboat.tasks.tensors import RawTensor

HEAD = "budget: {budget}\nmargin: 4\ncalibration: 200ms\ntasks:\n"
ASKED = (
    '  - {name: asked, model: "tasks_test_nets:other", weights: other.safetensors, input: {queue: q}, '
    "contract: {burst: 2, period: 400ms}, deadline: 400ms}\n"
)
FREE = (
    '  - {name: free, model: "tasks_test_nets:deep", weights: deep.safetensors, input: {queue: q}, '
    "contract: {burst: 50, period: 20ms}, deadline: 1s, guarantee: best-effort}\n"
)
CLOCKED = '  - {name: clocked, model: "tasks_test_nets:deep", weights: deep.safetensors, period: 1s}\n'


def write(folder: Path, tasks: str = ASKED + FREE, budget: str = "80MiB", name: str = "serve.yaml") -> Path:
    """A file of tasks."""
    path = folder / name
    path.write_text(HEAD.format(budget=budget) + tasks)
    return path


def raw(x: torch.Tensor) -> RawTensor:
    """A tensor's bytes."""
    return RawTensor("FP32", tuple(x.shape), x.numpy().tobytes())


def first(reply: Reply) -> torch.Tensor:
    """The first output."""
    spec, tensor = reply.outputs[0]
    return torch.from_numpy(np.frombuffer(tensor.data, dtype=np.float32).reshape(spec.shape).copy())


def with_gateway(
    file: Path, work: Callable[[LiveGateway], Coroutine[Any, Any, None]], models: Path | None = None
) -> None:
    """Run ``work`` with a gateway that serves; nothing of it is left afterwards."""

    async def go() -> None:
        gateway = LiveGateway(ServeSettings(file, port=0, grpc_port=None, models=models), lambda said: None)
        await asyncio.wait_for(gateway.start(), 120)
        try:
            await asyncio.wait_for(work(gateway), 120)
        finally:
            await gateway.close()

    before = open_files()
    asyncio.run(go())
    assert open_files() <= before, "a gateway that is closed leaves nothing open"


class Served:
    """A gateway that serves on a thread of its own until the context ends; nothing of it is left afterwards.

    ``last_asked`` is when the last ``run`` ended, by the monotonic clock.
    """

    def __init__(self, file: Path) -> None:
        self.last_asked = 0.0
        self._before = open_files()
        self._file = file
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="served")

    def run(self, work: Callable[[LiveGateway], Coroutine[Any, Any, None]]) -> None:
        """Run ``work`` with the gateway; its errors are raised here."""
        try:
            asyncio.run_coroutine_threadsafe(asyncio.wait_for(work(self._gateway), 120), self._loop).result()
        finally:
            self.last_asked = time.monotonic()

    def __enter__(self) -> Served:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except BaseException:
            self._end()
            raise
        return self

    async def _start(self) -> None:
        self._gateway = LiveGateway(ServeSettings(self._file, port=0, grpc_port=None, models=None), lambda said: None)
        await asyncio.wait_for(self._gateway.start(), 120)

    def __exit__(self, *_: object) -> None:
        try:
            asyncio.run_coroutine_threadsafe(self._gateway.close(), self._loop).result(120)
        finally:
            self._end()
        assert open_files() <= self._before, "a gateway that is closed leaves nothing open"

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


def open_files() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for it."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def outcome(asked: Awaitable[Reply]) -> Reply | BaseException:
    """The answer, or the error."""
    try:
        return await asked
    except Exception as error:
        return error
