"""Nothing is printed while a pass runs on fake tensors: whatever is worth a line, the real pass says again."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_LOG = logging.getLogger("torch._subclasses.fake_tensor")  # tells of shapes that do not fit, with a traceback
_IGNORE = ("ignore", None, Warning, None, 0)

P = ParamSpec("P")
T = TypeVar("T")


def quiet_on_fake_tensors(forward: Callable[P, T]) -> Callable[P, T]:
    """The same function, which prints no warnings and no log lines of torch's where it is called on fake tensors."""

    @functools.wraps(forward)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if not any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()):
            return forward(*args, **kwargs)
        with _quiet():
            return forward(*args, **kwargs)

    return called


@contextmanager
def _quiet() -> Iterator[None]:
    always, filters = torch.is_warn_always_enabled(), cast(list[Any], warnings.filters)

    def nothing(record: logging.LogRecord) -> bool:
        return False

    # Not ``catch_warnings``, which has Python forget what it has told already, and tell it once more afterwards.
    filters.insert(0, _IGNORE)
    _LOG.addFilter(nothing)
    torch.set_warn_always(True)  # what torch warns of once in a process, it shall still warn of in the real pass
    try:
        yield
    finally:
        torch.set_warn_always(always)
        _LOG.removeFilter(nothing)
        with suppress(ValueError):  # the pass has exchanged the filters
            filters.remove(_IGNORE)
