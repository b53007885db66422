"""The results for people: tables on the screen and in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from generate_kit.subjects import SUBJECTS
from inference_kit.report import conditions, markdown_row, verdict_lines
from narrowboat.quantities import format_bytes, format_seconds

_DECODER_COLUMNS = (
    "subject",
    "tokens/s",
    "s / token",
    "of bound",
    "narrowboat is",
    "first token",
    "peak",
    "read / token",
    "tokens",
)
_MAP_COLUMNS = (
    "model",
    "budget",
    "single passes",
    "map",
    "ratio",
    "group",
    "sweep (predicted)",
    "reading / computing",
    "same bits",
)


def decoder_rows(cell: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per subject."""
    return [_decoder_row(name, cell["rows"][name]) for name in SUBJECTS if name in cell["rows"]]


def _decoder_row(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    def number(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else format(value, form) + unit

    speed = number(row["tokens_per_s"], ".3f")
    if row["status"] != "ok":
        word = {"oom": "killed", "timeout": "stopped", "error": "failed"}[row["status"]]
        speed = word if row["tokens_per_s"] is None else f"{speed} ({word})"
    same = {True: "same", False: "differ", None: "-"}[row["same"]]
    return (
        SUBJECTS[name].label,
        speed,
        number(row["token_s"], ".3f"),
        number(row["of_bound"]["checked"], ".3f"),
        number(row["gain"], ".2f", " x as fast") if name != "narrowboat" else "-",
        format_seconds(row["first_s"]) if row["first_s"] is not None else "-",
        format_bytes(row["peak_bytes"]) if row["peak_bytes"] is not None else "-",
        format_bytes(int(row["bytes_read"])) if row["bytes_read"] is not None else "-",
        f"{row['fewest_tokens']}, {same}",
    )


def decoder_facts(cell: dict[str, Any]) -> list[str]:
    """What the bound is made of, and where narrowboat's time goes."""
    reading = cell["must_read_bytes"]
    lines = [
        f"{format_bytes(cell['weight_bytes'])} of weights, of which a token uses "
        f"{format_bytes(cell['bytes_per_token'])} (one row of the token table); budget "
        f"{format_bytes(cell['budget_bytes'])}, of which {format_bytes(cell['fixed_bytes'])} are not for weights; "
        f"storage {_rate(cell['bandwidth'])} (direct reads {_rate(min(cell['direct_reads'], default=None))} to "
        f"{_rate(max(cell['direct_reads'], default=None))}); {cell['prompt_tokens']} tokens of prompt.",
        f"Bytes that must be read per token: used - (budget - not for weights) = {format_bytes(reading['checked'])}. "
        f"Stricter, used - budget: {format_bytes(reading['strictest'])}; weights - budget: "
        f"{format_bytes(reading['all weights'])}.",
    ]
    for name in ("narrowboat", "narrowboat_unpacked"):
        row = cell["rows"].get(name)
        if row is None or row["read_s"] is None:
            continue
        shares = ", ".join(
            f"{share:.3f} ({formula})" for formula, share in row["of_bound"].items() if share is not None
        )
        lines.append(
            f"{SUBJECTS[name].label}: of bound {shares}. A token reads {format_bytes(int(row['bytes_read']))} in "
            f"{format_seconds(row['read_s'])} ({row['bytes_read'] / row['read_s'] / 1e9:.2f} GB/s while reading), "
            f"waits {format_seconds(row['stall_s'])}, predicted {format_seconds(row['predicted_s'])}; "
            f"{format_bytes(int(row['resident_bytes']))} resident, window {format_bytes(int(row['window_bytes']))}; "
            f"tables read by rows: {', '.join(row['tables_by_row']) or 'none'}."
        )
    lines += sorted(
        f"{SUBJECTS[name].label}: {row['status']}, {row['detail']}"
        for name, row in cell["rows"].items()
        if row["status"] != "ok"
    )
    return lines


def map_rows(maps: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line per model."""
    return [
        (
            run["model"],
            f"1/{run['divisor']:g} ({format_bytes(run['budget'])})",
            format_seconds(run["cell"]["single_s"]),
            format_seconds(run["cell"]["map_s"]),
            f"{run['cell']['ratio']:.2f}",
            str(run["cell"]["group"]),
            f"{_seconds(run['cell']['sweep_s'])} ({_seconds(run['cell']['predicted_sweep_s'])})",
            f"{_seconds(run['cell']['read_s'])} / {_seconds(run['cell']['compute_s'])}",
            "yes" if run["cell"]["exact"] else "no",
        )
        for run in maps
    ]


def single_rows(cells: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line per subject of each cell of ``inference_kit.derive``."""
    return [
        (
            f"{cell['model']}, {format_bytes(cell['budget_bytes'])}",
            name,
            _seconds(row["steady_s"]),
            f"{row['bound_ratio']:.3f}" if row["bound_ratio"] is not None else row["status"],
            _seconds(cell["must_read_s"]),
            format_bytes(int(row["bytes_read"])) if row["bytes_read"] is not None else "-",
            f"{cell['bandwidth'] / 1e9:.2f} GB/s",
        )
        for cell in cells
        for name, row in cell["rows"].items()
    ]


_SINGLE_COLUMNS = ("model, budget", "subject", "pass", "x bound", "must read takes", "read / pass", "storage")


def _rate(value: float | None) -> str:
    return "unknown" if value is None else f"{value / 1e9:.2f} GB/s"


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


def _parts(record: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]], list[str]]]:
    """Heading, columns, rows and notes of each table."""
    found: list[tuple[str, tuple[str, ...], list[tuple[str, ...]], list[str]]] = []
    cell = record["decoder"]
    if cell is not None:
        heading = f"{cell['model']} generating at 1/{cell['divisor']:g} of its bytes"
        found.append((heading, _DECODER_COLUMNS, decoder_rows(cell), decoder_facts(cell)))
    if record["single"]:
        found.append(("One pass at a time", _SINGLE_COLUMNS, single_rows(record["single"]), []))
    if record["maps"]:
        inputs = record["maps"][0]["inputs"]
        note = "Reading and computing are those of a single pass; a sweep can gain about their ratio."
        found.append((f"map over {inputs} inputs", _MAP_COLUMNS, map_rows(record["maps"]), [note]))
    return found


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """Every table, with its notes."""
    for heading, columns, rows, notes in _parts(record):
        table = Table(title=heading, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for note in notes:
            console.print(note, markup=False)


def write_markdown(path: Path, record: dict[str, Any]) -> None:
    """The tables, how they were made, and the verdicts."""
    lines = [
        "# Generating and mapping inside a byte budget",
        "",
        f"Made by `{record['command']}`; the raw numbers are in `generate.json`.",
        "",
        *conditions(record["machine"]),
        "",
        "*s / token*: the median over children of their median times from one token to the next, without the first "
        "ones. *of bound*: tokens per second over bandwidth / bytes that must be read per token (median of the "
        "rounds), the bandwidth being the most seen beside that child: in direct reads before and after it, or by the "
        "child itself while it read. *narrowboat is*: within the same round.",
        "",
    ]
    for heading, columns, rows, notes in _parts(record):
        lines += [f"## {heading}", "", markdown_row(columns), markdown_row(["---"] * len(columns))]
        lines += [markdown_row(row) for row in rows]
        lines += ["", *(f"- {note}" for note in notes), ""]
    lines += verdict_lines(record["checks"])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
