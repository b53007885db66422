"""Small networks with weights, importable by name in a process of their own."""

from __future__ import annotations

from task_nets_kit import nets

__all__ = ["nets"]
