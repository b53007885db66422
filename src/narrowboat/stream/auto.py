"""``budget="auto"``: the budget follows what the machine can spare, slowly upwards and at once downwards.

What can be spared is the least room under any limit that applies (memory cgroup, MemAvailable, rlimits) plus what the
session holds already, less a margin for the others. Pressure (PSI: the share of time in which some task waited for
memory) asks for less even where bytes seem to be free.

Source: the kernel's Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from narrowboat.errors import NarrowboatError
from narrowboat.machine.cgroup_tree import ROOT, read_text
from narrowboat.machine.memory import memory_limits
from narrowboat.quantities import format_bytes

if TYPE_CHECKING:
    from narrowboat.stream.session import Session

log = logging.getLogger("narrowboat")
INTERVAL = 0.25  # seconds between two looks
_SHARE = 0.85  # of what could be had; the rest is the others'
_PRESSED = 10.0  # percent of ten seconds spent waiting for memory
_LESS = 0.04  # a shrink is worth a change of plan from here on
_MORE = 0.12  # and growth, if there was room for it
_LOOKS = 20  # times in a row


@dataclass(slots=True)
class Hysteresis:
    """Decides when what could be had is worth a change of budget.

    Attributes:
        floor: the smallest budget, bytes.
        ceiling: what holds everything; more would be of no use.
    """

    floor: int
    ceiling: int
    _roomy: list[int] = field(default_factory=list)

    def wanted(self, now: int, spare: int, pressure: float) -> tuple[int, str] | None:
        """The new budget and why, or None to leave it.

        Args:
            now: the budget in force, bytes.
            spare: bytes the session could have in all, what it holds included.
            pressure: percent of recent time in which tasks waited for memory.
        """
        target = int(spare * _SHARE)
        cause = f"{format_bytes(spare)} can be had"
        if pressure >= _PRESSED:
            target = min(target, int(now * 0.9))
            cause = f"memory pressure {pressure:.0f} %"
        target = max(self.floor, min(target, self.ceiling))
        if target < now * (1 - _LESS):
            self._roomy.clear()
            return target, cause
        if target > now * (1 + _MORE) or (target == self.ceiling > now):
            self._roomy.append(target)
            if len(self._roomy) >= _LOOKS:
                # The least of the looks: a gap between two neighbours' peaks is no room.
                least = min(self._roomy)
                self._roomy.clear()
                return least, cause
            return None
        self._roomy.clear()
        return None


def initial_budget(ceiling: int, root: Path = ROOT) -> tuple[int, str]:
    """The budget to begin with, and the limit that sets it in words; logged once, as a number."""
    limits = memory_limits(root)
    budget = min(int(limits.available * _SHARE), ceiling)
    why = "holds the whole model" if budget == ceiling else limits.limiter
    log.info("budget auto: %s (%s)", format_bytes(budget), why)
    return budget, why


def memory_pressure(root: Path = ROOT) -> float:
    """Percent of the last ten seconds in which some task waited for memory; 0 where the kernel does not say."""
    for line in (read_text(root / "proc/pressure/memory") or "").splitlines():
        words = dict(word.split("=", 1) for word in line.split()[1:] if "=" in word)
        if line.startswith("some"):
            try:
                return float(words.get("avg10", "0"))
            except ValueError:
                return 0.0
    return 0.0


def follow_limits(session: Session, ceiling: int) -> None:
    """Look at the limits four times a second for as long as the session lives, from a thread of its own."""
    stop = session.following = threading.Event()
    weakref.finalize(session, stop.set)
    arguments = (weakref.ref(session), Hysteresis(session.prepared.check(ceiling)[0], ceiling), stop)
    threading.Thread(target=_watch, args=arguments, name="narrowboat-auto-budget", daemon=True).start()


def _watch(reference: weakref.ref[Session], hysteresis: Hysteresis, stop: threading.Event) -> None:
    while not stop.wait(INTERVAL):
        session = reference()
        if session is None or session.closed or session.following is not stop:
            return
        try:
            limits = memory_limits()
            held = max(limits.process.rss - int(session.stats()["baseline_bytes"]), 0)
            change = hysteresis.wanted(session.budget, limits.available + held, memory_pressure())
            if change is not None:
                session.change_budget(change[0], cause=f"auto: {change[1]}")
        except NarrowboatError as error:
            log.warning("auto budget: %s", error)
        except Exception:
            log.exception("auto budget: this look failed")
        del session
