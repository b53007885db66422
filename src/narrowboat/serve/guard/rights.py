"""Which right a request needs: one table for all rooms."""

from __future__ import annotations

import re
from typing import Literal

Right = Literal["open", "use", "admin"]

# Paths are matched as the routers see them, with escapes undone. What is not listed needs "use". The administrative
# patterns are wider than the routes behind them, so that no spelling of a path gets there with less.
_OPEN = re.compile(r"/|/favicon\.(ico|svg)|/openapi\.json|/v2/health/(live|ready)", re.DOTALL)
_ADMIN = re.compile(r"/v2/repository/models/.*/(load|unload)/*", re.DOTALL)
_ADMIN_METHODS = {("PUT", "/v1/budget")}
_READING = frozenset({"GET", "HEAD"})


def right_for(method: str, path: str) -> Right:
    """The right that a request needs.

    Args:
        method: in capitals.
        path: with its escapes undone.
    """
    if method in _READING and _OPEN.fullmatch(path):
        return "open"
    if (method, path.rstrip("/")) in _ADMIN_METHODS or (method not in _READING and _ADMIN.fullmatch(path)):
        return "admin"
    return "use"
