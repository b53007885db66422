"""Measure which OpenMP wait policy and thread count serve this machine best, alone and beside a busy process."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from narrowboat.errors import NarrowboatError
from narrowboat.machine.busy import busy_processes
from narrowboat.machine.cpu import usable_cores
from narrowboat.machine.openmp import DEFAULT_SPINCOUNT, OpenMPChoice

POLICIES = ("default", "1000", "10000", "passive")
_SHAPING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES")


@dataclass(frozen=True, slots=True)
class OpenMPRow:
    """Median seconds of a pass of a small network under one setting.

    Attributes:
        policy: wait policy, as in :class:`~narrowboat.machine.openmp.OpenMPChoice`.
        threads: threads of a parallel region.
        alone: seconds with nothing else running that we started.
        busy: seconds beside one busy process.
    """

    policy: str
    threads: int
    alone: float
    busy: float

    @property
    def score(self) -> float:
        """Geometric mean of both, in seconds; the smaller the better."""
        return math.sqrt(self.alone * self.busy)


@dataclass(frozen=True, slots=True)
class OpenMPMeasurement:
    """Every setting measured, and the one to use."""

    rows: tuple[OpenMPRow, ...]
    choice: OpenMPChoice


def choose(rows: Sequence[OpenMPRow], cores: int) -> OpenMPChoice:
    """The row with the best score; within 3 % of it, the built-in spin count and the full team are kept.

    The thread count is left to the runtime (None) where the full team is best.
    """
    best = min(row.score for row in rows)
    near = [row for row in rows if row.score <= 1.03 * best]
    row = min(near, key=lambda one: (one.policy != str(DEFAULT_SPINCOUNT), -one.threads, one.score))
    return OpenMPChoice(row.policy, None if row.threads == cores else row.threads, cores)


class _Child:
    """One process with its environment fixed, giving pass times on request."""

    def __init__(self, policy: str, threads: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _SHAPING}
        environment |= OpenMPChoice(policy, threads, threads).environment()
        self._process = subprocess.Popen(
            # -P: the script's folder must not shadow modules of the same name.
            [sys.executable, "-P", str(Path(__file__).with_name("openmp_child.py")), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> list[float]:
        out = self._process.stdout
        line = out.readline() if out is not None else ""
        if not line:
            _, complaint = self._process.communicate()
            last = (complaint.strip().splitlines() or ["no message"])[-1]
            raise NarrowboatError(f"the OpenMP measurement's child process failed: {last}")
        return [float(value) for value in json.loads(line)]

    def median(self, seconds: float) -> float:
        """Median seconds of a pass, over about ``seconds``."""
        if self._process.stdin is None:
            raise NarrowboatError("the OpenMP measurement's child process has no input")
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return statistics.median(self._answer())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def thread_counts(cores: int) -> list[int]:
    """Team sizes worth trying: all cores, one fewer (a core for the reader), then halves down to 1."""
    counts = {cores, max(1, cores - 1), 1}
    half = cores // 2
    while half >= 1:
        counts.add(half)
        half //= 2
    return sorted(counts, reverse=True)


def _interleaved(children: Sequence[_Child], seconds: float, repeats: int) -> list[list[float]]:
    """Medians of each child, taken in turns, so that a slow minute of the machine falls on all of them."""
    times: list[list[float]] = [[] for _ in children]
    for _ in range(repeats):
        for child, values in zip(children, times, strict=True):
            values.append(child.median(seconds))
    return times


def _measure(settings: Iterable[tuple[str, int]], seconds: float, repeats: int) -> list[OpenMPRow]:
    pairs = list(settings)
    children: list[_Child] = []
    try:
        for policy, threads in pairs:
            children.append(_Child(policy, threads))
        alone = _interleaved(children, seconds, repeats)
        with busy_processes(1):
            busy = _interleaved(children, seconds, repeats)
    finally:
        for child in children:
            child.close()
    return [
        OpenMPRow(policy, threads, statistics.median(quiet), statistics.median(loaded))
        for (policy, threads), quiet, loaded in zip(pairs, alone, busy, strict=True)
    ]


def measure_openmp_policies(
    *,
    cores: int | None = None,
    policies: Sequence[str] = POLICIES,
    seconds: float = 0.4,
    repeats: int = 3,
    progress: Callable[[str], None] | None = None,
) -> OpenMPMeasurement:
    """Time a small network under each wait policy with all cores, then under the best one with fewer threads.

    Each setting runs in a child process of its own, since the runtime reads its environment once. It takes some
    20 seconds on two cores, most of it importing torch.

    Args:
        cores: full team; the cores this process can keep busy by default.
        policies: wait policies to try.
        seconds: of passes per setting, load and repeat.
        repeats: medians taken per setting and load, in turns.
        progress: called with what is being measured, in words.

    Raises:
        NarrowboatError: a child process failed, e.g. because torch is not installed.
    """
    tell = progress or (lambda _: None)
    team = usable_cores() if cores is None else cores
    tell(f"wait policies with {team} threads")
    rows = _measure([(policy, team) for policy in policies], seconds, repeats)
    best = choose(rows, team).policy
    fewer = [count for count in thread_counts(team) if count < team]
    if fewer:
        tell("fewer threads")
        rows += _measure([(best, count) for count in fewer], seconds, repeats)
    return OpenMPMeasurement(tuple(rows), choose(rows, team))
