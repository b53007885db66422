"""The executor's process: reads one request on stdin, tells what happens on a pipe of its own, one JSON per line.

Apart from the process that asks, because a busy thread beside it would hold the interpreter for milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from narrowboat.machine.openmp import apply_openmp_policy
from narrowboat.tasks.execute.lines import Lines


class Pipe:
    """Lines to whoever started this process."""

    def __init__(self, descriptor: int) -> None:
        self._lines = Lines(os.fdopen(descriptor, "wb"))

    def tell(self, what: str, **told: Any) -> None:
        """One line; if nobody reads any more there is nothing to run for."""
        try:
            self._lines.write({"event": what, **told})
        except (BrokenPipeError, ValueError):
            os._exit(1)


def main() -> None:
    """Serve one request."""
    pipe = Pipe(int(sys.argv[1]))
    request = next(Lines(sys.stdin.buffer).read())
    os.environ["OMP_NUM_THREADS"] = "1"
    apply_openmp_policy()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent says what to do
    from narrowboat.errors import NarrowboatError

    try:
        from narrowboat.tasks.execute import realtime

        realtime.prepare_process()
        if request["do"] == "measure":
            from narrowboat.tasks.execute.calibrate import measure

            pipe.tell("measured", **measure(request, pipe))
        else:
            from narrowboat.tasks.execute.exchange import Exchange
            from narrowboat.tasks.execute.start import run

            run(request, pipe, Exchange.attach([int(number) for number in sys.argv[2:]]))
    except NarrowboatError as error:
        pipe.tell("error", type=type(error).__name__, message=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
