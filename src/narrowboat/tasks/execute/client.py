"""The asking side of the executor's process: start it, hear what it says, notice when it is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from narrowboat import errors
from narrowboat.errors import ExecutorError, NarrowboatError
from narrowboat.tasks.execute.exchange import Exchange
from narrowboat.tasks.execute.lines import Lines


class Child:
    """One executor process, for one request.

    Args:
        request: what it should do.
        exchange: for jobs that come from outside.

    Raises:
        ExecutorError: it could not be started.
    """

    def __init__(self, request: dict[str, Any], exchange: Exchange | None = None) -> None:
        reading, writing = os.pipe()
        shared = exchange.descriptors if exchange is not None else []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "narrowboat.tasks.execute.child", *map(str, (writing, *shared))],
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(writing, *shared),
            )
        except OSError as error:
            os.close(reading)
            raise ExecutorError(f"the executor could not be started: {error.strerror}") from error
        finally:
            os.close(writing)
        assert self.process.stdin is not None
        self._lines, self._stdin = Lines(os.fdopen(reading, "rb")), Lines(self.process.stdin)
        self.tell(request)

    def tell(self, told: dict[str, Any]) -> None:
        """One line to its stdin."""
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended; whoever listens hears why
            self._stdin.write(told)

    def events(self) -> Iterator[dict[str, Any]]:
        """What it says, until it ends.

        Raises:
            ExecutorError: it ended by itself, without saying that it is done.
            NarrowboatError: what went wrong there.
        """
        finished = False
        for told in self._lines.read():
            if told["event"] == "error":
                self.process.wait()
                raise error_told(told)
            finished = finished or told["event"] in ("measured", "done")
            yield told
        code = self.process.wait()
        if not finished:
            raise ExecutorError(f"the executor {_how(code)}; {self._said()}")

    def _said(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"it last said: {lines[-1][:300]}" if lines else "it said nothing"

    def close(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._lines.close()
        self._errors.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def error_told(told: dict[str, Any]) -> NarrowboatError:
    """An error of the other process."""
    kind = getattr(errors, told["type"], NarrowboatError)
    try:
        made = kind(told["message"])
    except TypeError:  # an error that takes more than a message
        made = NarrowboatError(told["message"])
    assert isinstance(made, NarrowboatError)
    return made


def _how(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    return f"ended by itself with exit code {code}"
