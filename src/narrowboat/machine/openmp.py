"""How OpenMP's threads wait, and how many there are.

torch's CPU kernels run in OpenMP parallel regions. At the end of each the threads meet at a barrier, and by
default those that arrive early spin for a long time. Where there are as many threads as cores, any third
runnable thread (a reader, a camera process, another model) takes a core from one of them while the others
spin, and a pass becomes many times slower. A short spin (``GOMP_SPINCOUNT=1000``) keeps nearly all of the
speed of spinning and nearly all of the fairness of sleeping.

The runtime reads its environment once, when torch is loaded, so :func:`apply_openmp_policy` has to run before
``import torch``; this module imports nothing that imports torch.

Source: the libgomp manual, "GOMP_SPINCOUNT" and "OMP_WAIT_POLICY".
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from narrowboat.machine.cache import cache_folder, write_durably
from narrowboat.machine.cpu import usable_cores

DEFAULT_SPINCOUNT = 1000
FEW_CORES = 8
"""Up to this many cores, one busy neighbour is a large part of the machine."""

_WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class OpenMPChoice:
    """A wait policy and a thread count measured to be good on this machine.

    Attributes:
        policy: ``"default"``, ``"passive"``, or a spin count in digits.
        threads: threads per pass; None leaves it to the runtime.
        cores: cores usable when it was measured; it is not used with another number.
    """

    policy: str
    threads: int | None
    cores: int

    def environment(self) -> dict[str, str]:
        """The variables that put the choice in force."""
        variables: dict[str, str] = {}
        if self.policy == "passive":
            variables["OMP_WAIT_POLICY"] = "passive"
        elif self.policy != "default":
            variables["GOMP_SPINCOUNT"] = self.policy
        if self.threads is not None:
            variables["OMP_NUM_THREADS"] = str(self.threads)
        return variables


@dataclass(frozen=True, slots=True)
class AppliedPolicy:
    """What :func:`apply_openmp_policy` did.

    Attributes:
        variables: the variables it set.
        source: ``"user"`` (set already, left alone), ``"measured"`` (a saved choice) or ``"built-in"``.
        effective: False when torch was loaded already, so that this process does not see them (children will).
    """

    variables: dict[str, str]
    source: str
    effective: bool


def choice_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where the measured choice is kept."""
    return cache_folder(environ) / "openmp.json"


def save_choice(choice: OpenMPChoice, path: Path | None = None) -> Path:
    """Keep ``choice`` for later processes; returns the file.

    Raises:
        OSError: the cache folder cannot be written.
    """
    target = path or choice_path()
    write_durably(target, json.dumps(asdict(choice), indent=2) + "\n")
    return target


def load_choice(path: Path | None = None, *, cores: int | None = None) -> OpenMPChoice | None:
    """The choice kept earlier; None if there is none, it cannot be read, or it is for another number of cores."""
    try:
        data = json.loads((path or choice_path()).read_text(encoding="utf-8"))
        policy, threads, measured_on = data["policy"], data["threads"], data["cores"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = isinstance(policy, str) and (policy in {"default", "passive"} or policy.isdecimal())
    counted = threads is None or (isinstance(threads, int) and threads >= 1)
    if not known or not counted or measured_on != (usable_cores() if cores is None else cores):
        return None
    return OpenMPChoice(policy, threads, measured_on)


def apply_openmp_policy(environ: MutableMapping[str, str] | None = None, *, path: Path | None = None) -> AppliedPolicy:
    """Put the wait policy (and the thread count, if one was measured) into ``environ``, for torch to find.

    What the user has set is left alone: with ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` present the wait policy
    is not touched, with ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` present the thread count is not.

    Args:
        environ: the environment to write to; that of this process by default.
        path: the file of the saved choice; that in the user's cache by default.
    """
    target = os.environ if environ is None else environ
    choice = load_choice(path or choice_path(target))
    wanted = choice.environment() if choice else {"GOMP_SPINCOUNT": str(DEFAULT_SPINCOUNT)}
    user_waits = any(name in target for name in _WAIT_VARIABLES)
    user_counts = any(name in target for name in _THREAD_VARIABLES)
    chosen = {
        name: value
        for name, value in wanted.items()
        if not (user_waits and name in _WAIT_VARIABLES) and not (user_counts and name in _THREAD_VARIABLES)
    }
    target.update(chosen)
    source = "user" if user_waits else "measured" if choice else "built-in"
    return AppliedPolicy(
        chosen, source, effective=not chosen or target is not os.environ or "torch" not in sys.modules
    )


@dataclass(frozen=True, slots=True)
class OpenMPStatus:
    """The OpenMP policy this process runs (or, before torch is imported, will run) under.

    Attributes:
        cores: cores this process can keep busy.
        threads: threads of a parallel region.
        policy: ``"default"`` (long spin), ``"passive"``, ``"active"``, or the spin count in digits.
        runtime: the OpenMP library loaded (``"libgomp"``, ``"libomp"``, ``"libiomp5"``); None before torch is.
        risky: a pass may become many times slower as soon as anything else runs.
        advice: one sentence: why and what to do; empty if not risky.
    """

    cores: int
    threads: int
    policy: str
    runtime: str | None
    risky: bool
    advice: str


def _runtime(root: Path) -> str | None:
    try:
        maps = (root / "proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return next((name for name in ("libgomp", "libiomp5", "libomp") if f"/{name}" in maps), None)


def _threads(environ: Mapping[str, str], cores: int) -> int:
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else cores


def openmp_status(
    environ: Mapping[str, str] | None = None, *, cores: int | None = None, threads: int | None = None
) -> OpenMPStatus:
    """The policy in force, judged by the environment; ``cores`` and ``threads`` stand in for the machine in tests."""
    variables = os.environ if environ is None else environ
    count = usable_cores() if cores is None else cores
    team = _threads(variables, count) if threads is None else threads
    # A spin count, where given, overrides what the wait policy would have set it to.
    spin = variables.get("GOMP_SPINCOUNT", "").strip()
    policy = spin or variables.get("OMP_WAIT_POLICY", "").strip().lower() or "default"
    spins_long = policy in {"default", "active"} or spin.lower() in {"infinity", "infinite"}
    spins_long = spins_long or (spin.isdecimal() and int(spin) >= 100_000)
    risky = spins_long and team > 1 and count <= FEW_CORES and team >= count
    advice = (
        f"OpenMP's {team} threads spin at every barrier on {count} cores: anything else that runs can make a pass "
        f"many times slower; set GOMP_SPINCOUNT={DEFAULT_SPINCOUNT} before torch is imported "
        "(`narrowboat` commands do so themselves; `narrowboat doctor` measures the best value)"
        if risky
        else ""
    )
    return OpenMPStatus(count, team, policy, _runtime(Path("/")), risky, advice)


@lru_cache(maxsize=1)
def warn_about_openmp() -> None:
    """Warn once per process where waiting threads would starve whatever runs beside them."""
    status = openmp_status()
    if status.risky:
        logging.getLogger("narrowboat").warning("%s", status.advice)
