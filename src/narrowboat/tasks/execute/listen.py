"""What a run is told while it runs: other tasks or another budget, and to stop."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from narrowboat.tasks.execute.arrangement import Arrangement
from narrowboat.tasks.execute.change import Changer
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.lines import Lines
from narrowboat.tasks.execute.load_models import Loaded
from narrowboat.tasks.execute.serve_jobs import JobServer

if TYPE_CHECKING:
    from narrowboat.tasks.execute.child import Pipe


class Listener(threading.Thread):
    """Reads stdin; whoever asked for the run is gone when that ends, and the run ends too.

    Args:
        executor: runs.
        arrangement: that it began with.
        loaded: the networks.
        jobs: that come from outside.
        pipe: to whoever asked.
    """

    def __init__(
        self, executor: Executor, arrangement: Arrangement, loaded: Loaded, jobs: JobServer, pipe: Pipe
    ) -> None:
        super().__init__(name="narrowboat-listener", daemon=True)
        self._executor = executor
        self._changer = Changer(executor, arrangement, loaded, jobs, pipe)

    def run(self) -> None:
        """The thread."""
        for told in Lines(sys.stdin.buffer).read():
            if told["do"] == "stop":
                break
            if told["do"] == "change":
                self._changer.start(told)
        self._executor.stop_requested = True
