"""What of PyTorch's state belongs to a thread: carried to the one that runs a pass, or set aside during one."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class CastCache:
    """Autocast's cache of cast weights, which a pass does without.

    It would keep copies of every weight beside the budget, and weak references that forbid exchanging what is inside
    a parameter.
    """

    def __init__(self) -> None:
        self._was_on = True

    def turn_off(self) -> None:
        """A pass begins in this thread."""
        self._was_on = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def restore(self) -> None:
        """It has ended."""
        torch.set_autocast_cache_enabled(self._was_on)


@dataclass(frozen=True, slots=True)
class CallerState:
    """The calling thread's modes.

    Attributes:
        inference: inside ``torch.inference_mode``.
        grad: gradients are recorded.
        autocast: dtype of CPU autocast; None if it is off.
        threads: OpenMP threads per operator; a new thread would take the process's default.
        context: context variables.

    The default dtype, the random generator and ``torch.use_deterministic_algorithms`` are the process's.
    """

    inference: bool
    grad: bool
    autocast: torch.dtype | None
    threads: int
    context: contextvars.Context

    @classmethod
    def capture(cls) -> CallerState:
        """That of the calling thread."""
        return cls(
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
            torch.get_num_threads(),
            contextvars.copy_context(),
        )

    def run(self, call: Callable[[], Any]) -> Any:
        """Run ``call`` in the present thread as the caller would."""
        with self._in_force():
            return self.context.copy().run(call)

    @contextmanager
    def _in_force(self) -> Iterator[None]:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_autocast_cache_enabled(False)  # the thread has no other work
        with ExitStack() as stack:
            if self.inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.autocast is not None:
                stack.enter_context(torch.autocast("cpu", self.autocast))
            yield


def has_modes() -> bool:
    """Whether the calling thread has what cannot be carried over: dispatcher or function modes, ``vmap`` and the like.

    ``torch.set_default_device`` and profilers that count operators are such modes.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
