"""Ctrl-C at a chosen moment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import narrowboat

PACKAGE = str(Path(narrowboat.__file__).parent)


class Interrupter:
    """Raises KeyboardInterrupt at the n-th moment at which CPython would: after a C call, or as a function starts."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.moments = 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or not code.co_filename.startswith(PACKAGE):
            return
        self.moments += 1
        if self.moments == self.at:
            self.where = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name} ({event})"
            sys.setprofile(None)
            raise KeyboardInterrupt

    def run(self, action: Callable[[], object]) -> str:
        """``done`` or ``interrupted``; other errors pass through."""
        sys.setprofile(self)
        try:
            action()
        except KeyboardInterrupt:
            return "interrupted"
        finally:
            sys.setprofile(None)
        return "done"
