"""What this copy of narrowboat was made from: a commit, and when.

A wheel and a source distribution carry a small file that ``setup.py`` writes while they are built; a checkout asks
git. Only the standard library is used, because ``setup.py`` imports this module where nothing else is installed.

Source: the reproducible-builds.org specification of ``SOURCE_DATE_EPOCH``.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "_build.json"
"""Name of the file with the facts, in the package's folder."""

SHIPPED = ("src", "setup.py", "pyproject.toml", "README.md", "LICENSE", "packaging/man")
"""What of a checkout goes into a wheel: a change anywhere else does not alter it."""

_PACKAGE = Path(__file__).resolve().parents[1]
_GIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class BuildFacts:
    """Where a copy comes from; None is what is not known.

    Attributes:
        commit: of git, 40 or 64 hexadecimal digits.
        committed: when that was made, ISO 8601.
        modified: what is shipped differs from that commit.
        built: when the wheel or source distribution was made, ISO 8601 in UTC; None in a checkout.
    """

    commit: str | None = None
    committed: str | None = None
    modified: bool | None = None
    built: str | None = None

    def as_json(self) -> dict[str, str | bool | None]:
        """For machines, and for the file."""
        return asdict(self)


def build_facts(package: Path = _PACKAGE) -> BuildFacts:
    """The facts about the copy whose package lies in ``package``; all None if nothing is known. Never raises."""
    root = package.parents[1]
    if package.parent.name == "src":
        asked = facts_of_checkout(root)
        if asked is not None:
            return asked
    return _recorded(package / RECORD) or BuildFacts()


def facts_of_checkout(root: Path) -> BuildFacts | None:
    """What git says about the checkout ``root``; None if it is none, or git is missing or refuses."""
    if not (root / ".git").exists():  # a folder inside somebody else's repository tells of that one
        return None
    told = _git(root, "log", "-1", "--format=%H %cI")
    if not told:
        return None
    commit, _, committed = told.strip().partition(" ")
    changes = _git(root, "status", "--porcelain", "--", *SHIPPED)
    return BuildFacts(commit, committed, None if changes is None else bool(changes.strip()))


def facts_for_a_build(root: Path, environ: Mapping[str, str] | None = None) -> BuildFacts:
    """What to write into something that is built from ``root``: a checkout, or an unpacked source distribution.

    The time is ``SOURCE_DATE_EPOCH`` if that is set, so that two builds can have the same bytes; else now.
    """
    variables = os.environ if environ is None else environ
    known = facts_of_checkout(root) or _recorded(root / "src" / "narrowboat" / RECORD) or BuildFacts()
    epoch = variables.get("SOURCE_DATE_EPOCH", "")
    seconds = int(epoch) if epoch.isascii() and epoch.isdigit() else int(time.time())
    built = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    return BuildFacts(known.commit, known.committed, known.modified, built)


def write_facts(facts: BuildFacts, package: Path) -> Path:
    """Write the file into ``package``, and return its path. Raises OSError."""
    path = package / RECORD
    path.write_text(json.dumps(facts.as_json(), indent=1) + "\n", encoding="ascii")
    return path


def _recorded(path: Path) -> BuildFacts | None:
    try:
        told = json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict):
        return None
    texts = {name: told.get(name) for name in ("commit", "committed", "built")}
    modified = told.get("modified")
    return BuildFacts(
        **{name: value if isinstance(value, str) else None for name, value in texts.items()},
        modified=modified if isinstance(modified, bool) else None,
    )


def _git(root: Path, *arguments: str) -> str | None:
    # Variables of a git hook would point elsewhere; and asking must not write to the index.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    variables["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        asked = subprocess.run(
            ["git", "-C", str(root), *arguments],
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return asked.stdout if asked.returncode == 0 else None
