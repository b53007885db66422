"""Which of narrowboat's records a file is: found from its content, never from its name, and checked before use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from narrowboat.errors import NarrowboatError, UsageError
from narrowboat.quantities import format_bytes
from narrowboat.report.records.model import (
    About,
    BenchRecord,
    GenerateRecord,
    PlanRecord,
    ProfileRecord,
    RunRecord,
    Told,
)
from narrowboat.report.records.others import BenchmarkRecord, SummaryRecord, VerdictRecord
from narrowboat.report.records.training import TrainPlanRecord, TrainRecord
from narrowboat.tasks.record import FORMAT, Record
from narrowboat.trace import Trace

MOST = 256 << 20  # bytes of a file
_FILES = 200  # of a folder
Value = Told | Record | Trace

# The keys that only this record has together; the first that fits counts.
_KINDS: tuple[tuple[frozenset[str], str, type[Told]], ...] = (
    (frozenset({"latency_ms", "stall_ms", "fixed_parts", "peak_bytes"}), "run", RunRecord),
    (frozenset({"token_ids", "tokens_per_s", "bytes_per_token"}), "generate", GenerateRecord),
    (frozenset({"identity", "step_seconds", "policy"}), "profile", ProfileRecord),
    (frozenset({"plain_peak_bytes", "bottleneck", "curve"}), "plan --train", TrainPlanRecord),
    (frozenset({"limiter", "predicted_latency_ms", "window_bytes"}), "plan", PlanRecord),
    (frozenset({"learned", "samples_per_s", "plan"}), "train", TrainRecord),
    (frozenset({"rows", "rounds", "passes"}), "bench", BenchRecord),
    (frozenset({"admitted", "reasons", "suggestions", "tasks"}), "tasks check", VerdictRecord),
    (frozenset({"missed", "compute_share", "load_share", "tasks"}), "tasks summary", SummaryRecord),
)
_BENCHMARKS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"decoder", "checks", "machine"}), "generate"),
    (frozenset({"cells", "checks", "machine"}), "plan"),
    (frozenset({"summary", "checks", "machine"}), "inference"),
    (frozenset({"machine", "models"}), "training"),
    (frozenset({"curves", "soundness"}), "tasks"),
    (frozenset({"soak", "overhead"}), "soak"),
    (frozenset({"overload"}), "serve"),
    (frozenset({"throughput", "overhead"}), "serve"),
)


@dataclass(frozen=True)
class Loaded:
    """A record.

    Attributes:
        path: its file.
        kind: which command wrote it: ``"run"``, ``"plan"``, ``"profile"``, ``"bench"``, ``"generate"``, ``"train"``,
            ``"plan --train"``, ``"trace"``, ``"tasks"``, ``"tasks check"``, ``"tasks summary"``, ``"benchmark"``.
        value: what it says.
        about: by which command, on which machine, when, as far as it tells.
    """

    path: Path
    kind: str
    value: Any
    about: About


def load(path: str | Path) -> Loaded:
    """The record in a file that one of narrowboat's commands wrote.

    Raises:
        UsageError: no such file, too large, broken, or nothing that narrowboat writes; says which, in one line.
        TraceFormatError: a trace of tasks that is not whole.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UsageError(f"{path} is no file" if path.exists() else f"there is no {path}")
        size = path.stat().st_size
        if size > MOST:
            raise UsageError(f"{path} has {format_bytes(size)}; a report takes files up to {format_bytes(MOST)}")
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    if not raw.strip():
        raise UsageError(f"{path} is empty: was the command that wrote it interrupted?")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        hint = _not_json(raw, error)
        raise UsageError(f"{path} is no JSON document: {hint}") from error
    kind, value = _read(document, str(path))
    return Loaded(path, kind, value, _about(document, value))


def load_all(paths: Sequence[str | Path]) -> list[Loaded]:
    """Records of files and folders, in the order given; of a folder every JSON file that is one, by name.

    Raises:
        UsageError: as ``load`` for a file; a folder without a record says what is there.
    """
    found: list[Loaded] = []
    for path in map(Path, paths):
        found += _of_folder(path) if path.is_dir() else [load(path)]
    if not found:
        raise UsageError("no file to make a report of")
    return found


def _of_folder(folder: Path) -> list[Loaded]:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror or error}") from error
    if len(files) > _FILES:
        raise UsageError(f"{folder} has {len(files)} files; name those to report on, at most {_FILES}")
    found, refused = [], []
    for path in files:
        try:
            if _may_be_json(path):
                found.append(load(path))
        except NarrowboatError as error:
            refused.append(str(error))
    if not found:
        told = f": {refused[0]}" if refused else ""
        raise UsageError(f"nothing in {folder} was written by narrowboat{told}")
    return found


def _may_be_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"{"


def _not_json(raw: bytes, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is no text"
    told = str(error)
    if isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip()) - 1 and raw[:1] in b"{[":
        return f"it ends in the middle ({told})"
    return told


def _read(document: Any, where: str) -> tuple[str, Value]:
    """Kind and value."""
    if not isinstance(document, dict):
        raise UsageError(f"{where} is not written by any of narrowboat's commands: no object, but {_what(document)}")
    if set(document) == {"error"} and isinstance(document["error"], dict):
        said = " ".join(str(document["error"].get("message", "")).split())[:300]
        raise UsageError(f"{where} tells of a command that failed, there is nothing to report: {said}")
    if str(document.get("format", "")).startswith(FORMAT.rpartition(" ")[0]):
        return "tasks", Record.from_json(document, where)
    if "traceEvents" in document:
        from narrowboat.report.timeline import trace_of

        return "trace", trace_of(document, where)
    keys = set(document)
    for marks, kind, model in _KINDS:
        if marks <= keys:
            return kind, _checked(model, document, where, kind)
    for marks, name in _BENCHMARKS:
        if marks <= keys:
            told = {"name": name, "told": document, "checks": document.get("checks", [])}
            return "benchmark", _checked(BenchmarkRecord, told, where, f"benchmarks/{name}.py")
    named = ", ".join(sorted(keys)[:5]) or "nothing"
    raise UsageError(
        f"{where} is not written by any of narrowboat's commands; it tells of {' '.join(named.split())[:200]}"
    )


def _checked(model: type[Told], document: dict[str, Any], where: str, kind: str) -> Told:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:120]
        raise UsageError(f"{where} is no whole record of {kind}: {place}: {first['msg'].lower()}") from error


def _about(document: dict[str, Any], value: Value) -> About:
    told = document.get("about", document.get("otherData", {}))
    if isinstance(value, BenchmarkRecord):
        machine = document.get("machine")
        told = {**machine, "torch": _torch(machine)} if isinstance(machine, dict) else {}
        told["command"] = document.get("command", "")
    try:
        return About.model_validate(told)
    except ValidationError:
        return About()


def _torch(machine: dict[str, Any]) -> str:
    packages = machine.get("packages")
    return str(packages.get("torch", "")) if isinstance(packages, dict) else str(machine.get("torch", ""))


def _what(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}.get(type(value), "a number")
