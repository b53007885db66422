"""Threads do not come along into a forked child: whoever waits for them there waits for ever."""

from __future__ import annotations

import os

from narrowboat.errors import TrainingError


class Home:
    """The process that something with threads or files of its own was made in.

    Attributes:
        left: this is another process, forked from that one.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def left(self) -> bool:
        """Whether this is another process."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Refuse to go on in a forked child.

        Raises:
            TrainingError: this is one.
        """
        if self.left:
            raise TrainingError(
                "this process was forked from the one that trains the model, and the threads that write and read its "
                "spill folder did not come along: train in that process, or start this one with the 'spawn' method "
                "and make the step in it"
            )
