"""The notebooks of examples/: each runs from top to bottom in a kernel of its own, and is kept without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def _pictures(book: Any) -> int:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["fine-tune", "one-model", "robot"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    cells = [cell for cell in _read(path).cells if cell.cell_type == "code"]
    assert cells
    assert not [cell for cell in cells if cell.outputs or cell.execution_count is not None]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_every_plot_is_a_picture(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "TMPDIR", "IPYTHONDIR", "NARROWBOAT_CACHE"):  # nothing of this user's, and nothing stays
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    book = _read(path)
    runner = nbclient.NotebookClient(
        book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    runner.execute()
    plotting = [
        cell for cell in book.cells if cell.cell_type == "code" and cell.source.splitlines()[-1].startswith("plots.")
    ]
    assert _pictures(book) == len(plotting) > 2
