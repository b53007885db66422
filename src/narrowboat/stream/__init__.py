"""Run one model inside a byte budget: reader, prefetcher, hooks, Session.

The package can be called: ``narrowboat.stream(model, weights, budget=...)`` is ``narrowboat.stream.api.stream``.
Nothing heavy is imported until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from narrowboat._callable_module import make_callable

if TYPE_CHECKING:
    from narrowboat.stream.api import stream as stream

__all__ = ["stream"]


def __getattr__(name: str) -> Any:
    if name == "stream":
        from narrowboat.stream import api

        return api.stream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


make_callable(__name__, "narrowboat.stream.api:stream")
