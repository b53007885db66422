"""Try an installed narrowboat as its first user would: ``python packaging/smoke.py --python VENV/bin/python``.

Run it against an environment that holds the wheel and what it depends on, without any extra: what then needs an extra
has to say which. Nothing is fetched, nothing but the work folder is written, and the checkout is not used. Exit code 1
if anything is not as it should be. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS = 120.0  # for one command, on a slow machine
MODEL, BUDGET = "narrowboat.zoo:mobilenet_v2", "40MiB"
TASKS = f"""\
budget: 60MiB
tasks:
  - name: look
    model: {MODEL}
    weights: packed.safetensors
    input: {{queue: look}}
    contract: {{burst: 1, period: 10s}}
    deadline: 10s
"""
PROBE = """\
import importlib.resources, json, sys
import narrowboat
files = importlib.resources.files("narrowboat")
wanted = ("py.typed", "_build.json", "serve/page/static/index.html", "cli/shell/_narrowboat")
print(json.dumps({
    "location": narrowboat.__file__, "version": narrowboat.__version__, "torch_imported": "torch" in sys.modules,
    "missing": [name for name in wanted if not files.joinpath(*name.split("/")).is_file()],
    "prefix": sys.prefix, "callable": callable(narrowboat.stream),
}))
"""


class WrongError(Exception):
    """Something is not as it should be; the message says what."""


class Smoke:
    """One installed copy, and a folder to work in."""

    def __init__(self, python: Path, work: Path) -> None:
        self.python, self.work = python, work
        # As in a shell that knows nothing of a checkout.
        dropped = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment["NARROWBOAT_CACHE"] = str(work / "cache")
        self.facts: dict[str, Any] = {}

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """The command with these arguments; wrong if it ends otherwise than with ``code``, or in a traceback."""
        finished = self.ask(str(self.python), "-m", "narrowboat", *arguments)
        said = (finished.stderr.strip() or finished.stdout.strip())[-600:]
        if "Traceback" in finished.stderr:
            raise WrongError(f"narrowboat {' '.join(arguments)}: a traceback: {said}")
        if finished.returncode != code:
            raise WrongError(f"narrowboat {' '.join(arguments)}: exit code {finished.returncode}, not {code}: {said}")
        return finished

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Any command, in the work folder."""
        return subprocess.run(
            command,
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    # -- what is tried, in this order -----------------------------------------------------------------

    def imports(self) -> str:
        """It is the installed copy, whole, and quick to import."""
        finished = self.ask(str(self.python), "-c", PROBE)
        if finished.returncode:
            raise WrongError(f"import narrowboat: {finished.stderr.strip()[-600:]}")
        found = json.loads(finished.stdout)
        if found["missing"]:
            raise WrongError(f"the package lacks {', '.join(found['missing'])}")
        if found["torch_imported"]:
            raise WrongError("import narrowboat imports torch")
        page = Path(found["prefix"]) / "share" / "man" / "man1" / "narrowboat.1"
        if "site-packages" in found["location"] and not page.is_file():
            raise WrongError(f"there is no manual page {page}")
        self.facts["version"] = found["version"]
        return found["location"]

    def version(self) -> str:
        """The version is told, for people and for machines, by the module and by the script."""
        first = self.run("--version").stdout.splitlines()[0]
        if first != f"narrowboat {self.facts['version']}":
            raise WrongError(f"--version begins with {first!r}")
        told = json.loads(self.run("--version", "--json").stdout)
        self.facts["extras"] = told["extras"] or {}
        script = self.python.with_name("narrowboat")
        if script.exists() and self.ask(str(script), "--version").stdout.splitlines()[:1] != [first]:
            raise WrongError(f"{script} --version says something else than python -m narrowboat --version")
        return f"{first}, commit {told['build']['commit']}"

    def helps(self) -> str:
        """Every command has help, whatever is not installed."""
        names = [line.partition("\t")[0] for line in self.run("__complete", "").stdout.splitlines()]
        for name in names:
            self.run(name, "--help")
        if "doctor" not in names:
            raise WrongError(f"the commands are {names}")
        return ", ".join(names)

    def machine(self) -> str:
        """The doctor has findings."""
        told = json.loads(self.run("doctor", "--quick", "--json").stdout)
        return f"{len(told['findings'])} findings"

    def network(self) -> str:
        """Weights are made, packed, looked at, planned for and run, with the bits of plain PyTorch."""
        self.run("zoo", "save", "mobilenet_v2", "-o", "plain.safetensors")
        self.run("pack", "plain.safetensors", "-o", "packed.safetensors", "--model", MODEL, "--verify")
        if "packed" not in self.run("inspect", "packed.safetensors").stdout:
            raise WrongError("inspect does not say that the file is packed")
        weights = ("--weights", "packed.safetensors", "--budget", BUDGET)
        planned = self.run("plan", MODEL, *weights, "--json").stdout
        (self.work / "plan.json").write_text(planned)  # for `report`, later
        least = json.loads(planned)["min_budget_bytes"]
        told = self.run("run", MODEL, *weights, "--verify", "--passes", "2").stdout
        if "every bit of the output" not in told:
            raise WrongError(f"run --verify: {told[-600:]}")
        return f"as plain PyTorch in {BUDGET}; {least / 2**20:.1f} MiB would do"

    def extras(self) -> str:
        """What needs an extra that is not there says so, and which, in one line."""
        (self.work / "folder").mkdir(exist_ok=True)
        (self.work / "folder" / "config.json").write_text('{"model_type": "gpt2"}')
        (self.work / "tasks.yaml").write_text(TASKS)
        weights = ("--weights", "packed.safetensors", "--budget", BUDGET)
        needing: list[tuple[str, tuple[str, ...]]] = [
            ("hf", ("generate", "folder", "--prompt", "x", "--budget", "300MiB")),
            ("hf", ("run", "folder", "--budget", "300MiB")),
            ("plot", ("run", MODEL, *weights, "--timeline", "t.png")),
            ("serve", ("serve", "tasks.yaml", "--port", "0", "--grpc-port", "0")),
            ("ray", ("deploy", "tasks.yaml")),
            ("plot", ("report", "plan.json")),
            ("train", ("train", MODEL, "--data", "digits", "--size", "32", "--steps", "1", "--out", "o.safetensors")),
            ("demo", ("demo", "--photos-only")),
            ("demo", ("zoo", "save", "efficientnet_lite2", "-o", "e.safetensors")),
        ]
        missing = [(extra, arguments) for extra, arguments in needing if not self.facts["extras"].get(extra)]
        with ThreadPoolExecutor(2) as pool:  # most of it is waiting for PyTorch to be imported
            tried = list(pool.map(lambda one: self._needs(*one), missing))
        return ", ".join(tried) or "all are there"

    def _needs(self, extra: str, arguments: tuple[str, ...]) -> str:
        finished = self.ask(str(self.python), "-m", "narrowboat", *arguments)
        last = [line for line in finished.stderr.splitlines() if line.strip()][-1:]
        named = f"pip install 'narrowboat[{extra}]'"
        if finished.returncode not in (1, 2) or not last or named not in last[0] or "Traceback" in finished.stderr:
            said = finished.stderr.strip()[-600:]
            raise WrongError(f"narrowboat {' '.join(arguments)}: does not end with {named}, but: {said}")
        return f"{arguments[0]} ({extra})"

    def completions(self) -> str:
        """The shells' scripts are there."""
        for shell in ("bash", "zsh", "fish"):
            if "narrowboat" not in self.run("completion", shell).stdout:
                raise WrongError(f"completion {shell} prints nothing of use")
        return "bash, zsh, fish"


def main() -> int:
    """Run every check, print a line for each, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment to try")
    parser.add_argument("--work", type=Path, help="folder to work in; else a temporary one that is removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="narrowboat smoke ") as temporary:  # a path with spaces
        work = (given.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        smoke = Smoke(given.python.absolute(), work)  # not resolved: a link tells Python its environment
        checks: list[Callable[[], str]] = [smoke.imports, smoke.version, smoke.helps, smoke.machine]
        checks += [smoke.network, smoke.extras, smoke.completions]
        for check in checks:
            try:
                said = check()
            except (WrongError, subprocess.TimeoutExpired, OSError, ValueError, LookupError) as error:
                sys.stdout.write(f"{check.__name__:<12} WRONG: {error}\n")
                return 1
            sys.stdout.write(f"{check.__name__:<12} {said}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
