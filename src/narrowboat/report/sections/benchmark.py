"""Results of ``benchmarks/*.py``: what they checked, what they measured, and a picture where one says more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from narrowboat.report.draw.lines import draw_lines
from narrowboat.report.records.find import Loaded
from narrowboat.report.records.others import BenchmarkRecord
from narrowboat.report.sections.section import BAD, GOOD, NOTE, Section, Table, begin

_MIB = 1 << 20
_COLUMNS, _ROWS, _FACTS = 9, 40, 30
_Series = dict[str, list[tuple[float, float]]]


def benchmark_section(loaded: Loaded) -> Section:
    """A file that a benchmark wrote."""
    record: BenchmarkRecord = loaded.value
    section = begin(loaded, f"Benchmark: {record.name}")
    if record.checks:
        failed = [check for check in record.checks if not check.passed]
        total = len(record.checks)
        text = f"All {total} checks passed." if not failed else f"{len(failed)} of {total} checks failed."
        section.notice(BAD if failed else GOOD, text)
        for check in failed[:5]:
            at = f" ({check.where})" if check.where else ""
            section.notice(BAD, f"{check.what}{at}: {check.numbers}.")
        rows = [(c.what, c.where, "yes" if c.passed else "NO", c.numbers) for c in record.checks]
        columns = ["what", "where", "passed", "numbers"]
        section.tables.append(Table("Checks", columns, rows, frozenset({0, 1, 2, 3})))
    else:
        section.notice(NOTE, "This benchmark has no checks of its own; read its figures.")
    _pictures(section, record)
    section.tables += list(_tables(record.told))
    section.facts |= dict(list(_scalars(record.told))[:_FACTS])
    return section


def _pictures(section: Section, record: BenchmarkRecord) -> None:
    """The one that a benchmark is for; none where its file is not as expected."""
    kinds: Mapping[str, Any] = {"inference": _inference, "plan": _plan, "training": _training, "tasks": _tasks}
    series: _Series = {}
    how: dict[str, Any] = {}
    if record.name in kinds:
        found, how = kinds[record.name](record.told)
        series = {name: points for name, points in found.items() if points}
    if series:
        title = how["title"]
        section.picture(
            "overview",
            title,
            f"{len(series)} series of points: {', '.join(series)[:200]}.",
            how.pop("caption"),
            lambda width: draw_lines(series, **how, width=width),
        )


def _inference(told: Mapping[str, Any]) -> tuple[_Series, dict[str, Any]]:
    series: _Series = {}
    for cell in _objects(told.get("summary")):
        for subject, row in _mapping(cell.get("rows")).items():
            x, y = _number(cell.get("divisor")), _number(_mapping(row).get("ratio"))
            if x and y:
                series.setdefault(subject, []).append((100 / x, y))
    return series, {
        "title": "Slowdown against the share of the weights that fits",
        "caption": "Each shape is a subject; lower is better, and 1 is plain PyTorch with everything in memory.",
        "xlabel": "budget, % of the weights",
        "ylabel": "time of a pass, times plain PyTorch's",
        "joined": False,
    }


def _plan(told: Mapping[str, Any]) -> tuple[_Series, dict[str, Any]]:
    series: _Series = {}
    for cell in _objects(told.get("cells")):
        foreseen, seconds = _number(cell.get("foreseen")), _number(cell.get("seconds"))
        if foreseen and seconds:
            series.setdefault(str(cell.get("model")), []).append((foreseen * 1e3, seconds * 1e3))
    return series, {
        "title": "Predicted and measured passes",
        "caption": "A point on the dashed line was predicted exactly; above it the pass took longer.",
        "xlabel": "predicted before running, ms",
        "ylabel": "measured, ms",
        "joined": False,
        "diagonal": True,
    }


def _training(told: Mapping[str, Any]) -> tuple[_Series, dict[str, Any]]:
    series: _Series = {}
    for model, facts in _mapping(told.get("models")).items():
        rows = [row for row in _objects(_mapping(facts).get("records")) if row.get("subject") == "narrowboat"]
        batch = _number(_mapping(facts).get("batch")) or 0.0
        for row in rows:
            seconds, peak = _number(row.get("seconds")), _number(row.get("rss_peak"))
            if seconds and peak and batch:
                series.setdefault(str(model), []).append((peak / _MIB, batch / seconds))
    return series, {
        "title": "Throughput against memory",
        "caption": "Up and to the left is better.",
        "xlabel": "peak memory, MiB",
        "ylabel": "samples per second",
        "joined": True,
    }


def _tasks(told: Mapping[str, Any]) -> tuple[_Series, dict[str, Any]]:
    curve = _mapping(_mapping(told.get("curves")).get("utilisation"))
    xs = [_number(x) for x in _list(curve.get("x"))]
    series: _Series = {}
    for name, ys in _mapping(curve.get("share")).items():
        pairs = zip(xs, (_number(y) for y in _list(ys)), strict=False)
        series[str(name)] = [(x, y * 100) for x, y in pairs if x is not None and y is not None]
    return series, {
        "title": "Task sets that are admitted, against load",
        "caption": "The further right a line falls, the more the policy can promise.",
        "xlabel": "utilisation of the core",
        "ylabel": "admitted, % of the sets",
    }


def _tables(told: Mapping[str, Any]) -> Iterable[Table]:
    """Lists of alike objects, as tables of what is single in them."""
    for name, value in told.items():
        rows = [] if name in ("checks", "raw") else _objects(value)
        columns = [key for key, cell in rows[0].items() if not isinstance(cell, (dict, list))] if rows else []
        if len(rows) > 1 and columns:
            shown = columns[:_COLUMNS]
            cells = [[_cell(row.get(key)) for key in shown] for row in rows[:_ROWS]]
            more = f", {_ROWS} of {len(rows)} rows" if len(rows) > _ROWS else ""
            words = frozenset(k for k, key in enumerate(shown) if isinstance(rows[0].get(key), str))
            yield Table(f"{name}{more}", shown, cells, words)


def _scalars(told: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for name, value in told.items():
        if isinstance(value, dict) and not above and len(value) <= 40:
            yield from _scalars(value, f"{name}, ")
        elif not isinstance(value, (dict, list)) and value is not None and name != "command":
            yield f"{above}{name}", _cell(value)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)[:200]


def _number(value: Any) -> float | None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if fine and math.isfinite(value) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in _list(value) if isinstance(each, dict)]
