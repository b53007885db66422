"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable


def names(parser: argparse.ArgumentParser, text: str, known: Iterable[str], what: str) -> list[str]:
    """The comma-separated names in ``text``; leaves with a message if one is not among those ``known``."""
    chosen = [name for name in text.split(",") if name]
    for name in chosen:
        if name not in known:
            parser.error(f"no {what} {name!r}: there are {', '.join(known)}")
    return chosen


def with_resident_first(chosen: Iterable[str], known: Iterable[str]) -> list[str]:
    """Subjects in the order of ``known``, the reference of every ratio and of exactness first."""
    return ["resident", *(s for s in known if s in chosen and s != "resident")]


def make_folders(arguments: argparse.Namespace) -> None:
    """``--work`` and ``--out``, and in the first a cache of its own: what other runs have kept is not used or lost."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["NARROWBOAT_CACHE"] = str((arguments.work / "cache").resolve())
