"""What torch keeps per thread, taken from one thread into another."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def carried_over() -> Callable[[Callable[[], Result]], Result]:
    """Note this thread's state now; what is returned calls a function with that state, in whatever thread.

    Carried are grad and inference mode, autocast (per device type), the default device, the current accelerator
    device and stream, and context variables. Dispatch modes, function modes and hooks on saved tensors are not:
    two threads that shared one would see each other's operators.
    """
    makers: list[Callable[[], Any]] = []
    if torch.is_inference_mode_enabled():
        makers.append(torch.inference_mode)
    grad = torch.is_grad_enabled()
    makers.append(lambda: torch.set_grad_enabled(grad))
    device = torch.get_default_device()
    if device.type != "cpu":  # what a new thread has
        makers.append(lambda: device)
    if torch.cuda.is_initialized():
        stream = torch.cuda.current_stream()
        makers.append(lambda: torch.cuda.stream(stream))  # enters the stream's device too
    makers.extend(_autocasts())
    variables = contextvars.copy_context()

    @contextmanager
    def state() -> Iterator[None]:
        with ExitStack() as stack:
            for make in makers:
                stack.enter_context(make())
            yield

    def call(function: Callable[[], Result]) -> Result:
        with state():
            return variables.copy().run(function)

    return call


def _autocasts() -> list[Callable[[], Any]]:
    devices = {"cpu"}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        devices.add(accelerator.type)
    cache = torch.is_autocast_cache_enabled()
    return [
        partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device), cache_enabled=cache)
        for device in sorted(devices)
        if torch.is_autocast_enabled(device)
    ]
