"""A checkout of its own to build from, what is built from it, and an environment that holds only that."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFTOVERS = (
    "build/lib/narrowboat/left_by_an_earlier_build.py",
    "examples/serve/left.safetensors",
    "examples/serve/minilm/config.json",
    "examples/serve/babbler/config.json",
    "bench-work/left.json",
    "dist/left.whl",
)
"""What lies about in the tree of somebody who has worked in it; git ignores all of it."""


@dataclass(frozen=True)
class Built:
    """What came out.

    Attributes:
        checkout: it was built from here; its commit is ``commit``.
        wheel, sdist: the files.
    """

    checkout: Path
    commit: str
    wheel: Path
    sdist: Path


def run(*command: object, cwd: Path | None = None, seconds: float = 240, **variables: str) -> str:
    """The output of a command that has to end well. Git and pip read no settings of this user's."""
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", **variables}
    for name in ("PYTHONPATH", "GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        environment.pop(name, None)
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
    return done.stdout


def git(folder: Path, *arguments: object) -> str:
    """Git's answer in ``folder``."""
    author = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false")
    return run("git", "-C", folder, *author, *arguments)


def copy_checkout(target: Path) -> str:
    """Copy what git would keep of this checkout, commit it there, and return the commit."""
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    git(target, "init", "--quiet")
    git(target, "add", "--all")
    git(target, "commit", "--quiet", "--message", "as it is")
    return git(target, "rev-parse", "HEAD").strip()


def build(folder: Path) -> Built:
    """Wheel and source distribution of a copy of this checkout, leftovers and a space in its path included."""
    if not (ROOT / ".git").exists():
        pytest.skip("what is to be built is told from what lies about by git, and this is no checkout")
    pytest.importorskip("build", reason="the package build is not installed (narrowboat[dev] has it)")
    checkout = folder / "a checkout"
    commit = copy_checkout(checkout)
    for name in LEFTOVERS:
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    out = folder / "out"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(checkout, commit, wheel, sdist)


def install(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with the wheel and what it needs, at the pinned versions; no extras."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    pinned = ("--constraint", str(ROOT / "constraints.txt"))
    # Not compiled: most of PyTorch's modules will not be imported here.
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *pinned, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    said = done.stderr.strip()
    unreachable = ("No matching distribution", "NewConnectionError", "Max retries", "Temporary failure in name")
    if done.returncode and any(words in said for words in unreachable):
        pytest.skip(f"pip reaches no index here: {said.splitlines()[-1][:300]}")
    assert done.returncode == 0, said[-2000:]
    return python
