"""``narrowboat --version``: which copy this is, and what it runs on. Nothing that is named here is imported."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from narrowboat import __version__
from narrowboat.machine.build import BuildFacts, build_facts

_LIBRARIES = ("torch", "safetensors", "numpy")
_NOT_FOR_USERS = {"dev", "bench", "docs"}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"\bextra\s*==\s*['\"]([A-Za-z0-9._-]+)['\"]")


def version_facts() -> dict[str, Any]:
    """Everything, for machines: a version is None if a library is missing, ``extras`` if nothing is installed."""
    return {
        "narrowboat": __version__,
        "build": build_facts().as_json(),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "libraries": {name: installed_version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "extras": installed_extras(),
        "location": str(Path(__file__).resolve().parents[1]),
        "executable": sys.executable,
    }


def print_version(*, as_json: bool) -> None:
    """Print it on stdout; the first line for people is ``narrowboat`` and the version, and nothing else."""
    if as_json:
        from narrowboat.cli.output import print_json

        print_json(version_facts())
        return
    facts = version_facts()
    build = BuildFacts(**facts["build"])
    lines = {
        "commit": in_words(build),
        "built": build.built or "no: runs from its source" if build.commit else build.built or "not known",
        "Python": f"{facts['python']} ({facts['implementation']})",
        **{name: version or "missing" for name, version in facts["libraries"].items()},
        "platform": facts["platform"],
        "extras": _extras_in_words(facts["extras"]),
        "in": facts["location"],
    }
    typer.echo(f"narrowboat {__version__}")
    for name, said in lines.items():
        typer.echo(f"  {name:<12}{said}")


def in_words(build: BuildFacts) -> str:
    """The commit, its day, and whether the files are it."""
    if build.commit is None:
        return "not known"
    day = f" of {build.committed[:10]}" if build.committed else ""
    changed = {None: ", perhaps with changes", True: ", with changes", False: ""}[build.modified]
    return f"{build.commit[:12]}{day}{changed}"


def installed_version(name: str) -> str | None:
    """The version that the installer wrote down; None if the distribution is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_extras(distribution: str = "narrowboat") -> dict[str, bool] | None:
    """Each extra, and whether all its packages are there (whatever their versions); None if nothing is installed."""
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return None
    offered = [name for name in found.metadata.get_all("Provides-Extra") or [] if name not in _NOT_FOR_USERS]
    needs = _needs(found.requires or [])
    return {extra: all(installed_version(name) for name in _all_of(extra, needs, distribution)) for extra in offered}


def _needs(requirements: list[str]) -> dict[str, list[tuple[str, list[str]]]]:
    """Extra: the packages it asks for, each with the extras that it asks of them."""
    needs: dict[str, list[tuple[str, list[str]]]] = {}
    for text in requirements:
        wanted, _, marker = text.partition(";")
        extra, package = _EXTRA.search(marker), _REQUIREMENT.match(wanted.strip())
        if extra and package:
            of_it = [name.strip() for name in (package[2] or "").split(",") if name.strip()]
            needs.setdefault(extra[1], []).append((package[1], of_it))
    return needs


def _all_of(extra: str, needs: dict[str, list[tuple[str, list[str]]]], distribution: str) -> set[str]:
    """The packages of an extra; one that asks for other extras of the same distribution has theirs too."""
    packages: set[str] = set()
    todo, seen = [extra], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for package, of_it in needs.get(name, []):
            if package.lower() == distribution:
                todo += of_it
            else:
                packages.add(package)
    return packages


def _extras_in_words(extras: dict[str, bool] | None) -> str:
    if extras is None:
        return "not known: narrowboat is not installed as a package"
    there = [name for name, present in extras.items() if present]
    missing = [name for name, present in extras.items() if not present]
    return f"{', '.join(there) or 'none'}" + (f" (not there: {', '.join(missing)})" if missing else "")
