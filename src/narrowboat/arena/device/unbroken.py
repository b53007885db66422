"""What must not stop half-way, though Ctrl-C may strike between any two instructions of the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from narrowboat.arena.device.interface import Device


def unbroken(device: Device, task: Callable[[], None]) -> None:
    """Do ``task`` to its end, and then let the interruption through.

    Python runs handlers of signals in the main thread only; there, the task gets a thread of its own.

    Raises:
        Whatever the task raised; or else what struck meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        task()
        return
    known = device.hand_over()
    errors: list[BaseException] = []
    tokens: list[object] = []

    def body() -> None:
        device.take_over(known)
        try:
            task()
        except BaseException as error:
            errors.append(error)
        finally:
            tokens.append(device.hand_over())

    thread = threading.Thread(target=body, name="narrowboat-unbroken")
    struck: BaseException | None = None
    thread.start()
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as error:
            struck = error
    for token in tokens:
        device.take_over(token)
    try:
        if errors:
            raise errors[0]
        if struck is not None:
            raise struck
    finally:  # or what was raised would refer to itself, and keep all that its frames refer to
        errors.clear()
        del struck
