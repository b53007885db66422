"""The timeline as a picture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from narrowboat.errors import UsageError
from narrowboat.report.timeline import draw_timeline, read_chrome
from narrowboat.trace import Event, Trace


@pytest.fixture
def trace() -> Trace:
    made = Trace()
    made.add(Event("read", "layer.0", 100.0, 100.02, nbytes=2 << 20, worker=1))
    made.add(Event("compute", "layer.0", 100.02, 100.05))
    made.add(Event("stall", "layer.1", 100.05, 100.06))
    made.add(Event("compute", "a.name.that.is.much.too.long.to.be.written.out", 100.06, 100.0601))
    return made


def test_it_is_drawn_to_a_png_and_nothing_else_is_left(trace: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_timeline(trace, tmp_path / "t.png", since=100.01, title="two passes")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["t.png"]


def test_a_saved_trace_reads_back_as_it_was(trace: Trace, tmp_path: Path) -> None:
    trace.save_chrome(tmp_path / "t.json")
    again = read_chrome(tmp_path / "t.json").events()
    assert [(e.lane, e.name, e.nbytes, e.worker) for e in again] == [
        (e.lane, e.name, e.nbytes, e.worker) for e in trace.events()
    ]
    assert [e.end for e in again] == pytest.approx([e.end for e in trace.events()])


@pytest.mark.parametrize("text", ["", "[]", '{"traceEvents": [{}]}'])
def test_a_file_that_is_no_trace_is_wrong_usage(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError, match="not a trace"):
        read_chrome(tmp_path / "t.json")


def test_nothing_to_draw_is_said(trace: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="nothing to draw"):
        draw_timeline(trace, tmp_path / "t.png", since=200.0)


def test_without_matplotlib_the_extra_is_named(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"narrowboat\[plot\]"):
        draw_timeline(trace, tmp_path / "t.png")
    assert not list(tmp_path.iterdir())
