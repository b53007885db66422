"""The house of docs/DESIGN.md: a room imports only from rooms below it, and the pure rooms do not know torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "narrowboat"
FLOORS = [
    {"cli"},
    {"demo"},
    {"cluster"},
    {"serve"},
    {"report", "integrations"},
    {"tasks", "train"},
    {"stream"},
    {"profile"},
    {"plan"},
    {"checkpoint", "arena"},
    {"machine"},
    {"trace"},
    {"quantities"},
    {"errors"},
]
LEVEL = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[1] for name in names if name.startswith("narrowboat.")}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in LEVEL], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_from_rooms_below_it(path: Path) -> None:
    here = room_of(path)
    above = {room for room in imported_rooms(path) if room in LEVEL and room != here and LEVEL[room] > LEVEL[here]}
    assert not above, f"{path.relative_to(ROOT)} looks up to {sorted(above)}"


def test_every_room_has_its_floor() -> None:
    known = {*LEVEL, "zoo", "__init__", "__main__", "_callable_module"}
    assert {room_of(path) for path in FILES} <= known


def test_planning_never_imports_torch() -> None:
    modules = "narrowboat.plan, narrowboat.tasks.task_set, narrowboat.tasks.conform, narrowboat.tasks.policy.volume"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_file_grows_past_five_hundred_lines() -> None:
    assert not [str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > 500]
