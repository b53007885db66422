"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cuda_kit.bounds import best_peer
from cuda_kit.subjects import LABELS
from narrowboat.quantities import format_bytes, format_seconds

Lines = list[str]


def markdown(data: dict[str, Any]) -> str:
    """The whole page."""
    derived, records = data["derived"], data["records"]
    lines = ["# On a GPU", "", *_machine(data), ""]
    for part in ("vit", "decoder"):
        lines += _inference(part, derived, records)
    lines += _swap(derived.get("swap"))
    lines += _tasks(records)
    lines += _training(derived, records)
    lines += _checks(data["checks"])
    return "\n".join(lines).rstrip() + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Lines:
    """A table whose first ``left`` columns are words."""
    marks = ["---" if number < left else "---:" for number in range(len(columns))]
    body = [list(columns), marks, *(list(row) for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body]


def _machine(data: dict[str, Any]) -> Lines:
    machine, bandwidth = data["machine"], data["derived"].get("bandwidth", {})
    commands = [f"- `{run['command']}` ({run['began']}, commit {run.get('commit', '?')})" for run in data["runs"]]
    packages = ", ".join(f"{name} {number}" for name, number in machine.get("packages", {}).items())
    lines = [
        f"{machine.get('device', 'no device')}, {_bytes(machine.get('total_bytes'))}, driver "
        f"{machine.get('driver', 'none')}, {packages}, Python {machine.get('python')}, Linux {machine.get('kernel')}, "
        f"{machine.get('cores')} cores of {machine.get('processor')}, {_bytes(machine.get('host_bytes'))} of memory, "
        f"`GOMP_SPINCOUNT={machine.get('GOMP_SPINCOUNT')}`.",
        "",
        f"Pinned host memory to the device: {_rate(bandwidth.get('in'))}; back: {_rate(bandwidth.get('out'))} "
        "(medians of single copies, the best of the sizes).",
        "",
        "Made by:",
        "",
        *commands,
    ]
    return lines


def _inference(part: str, derived: dict[str, Any], records: dict[str, Any]) -> Lines:
    cells = [cell for cell in derived.get("cells", []) if cell["model"] == part]
    mine = [record for record in records.values() if record.get("part") == part]
    if not mine:
        return []
    weights = next((r["weight_bytes"] for r in mine if r.get("weight_bytes")), None)
    lines = [f"## Inference: {part}, {_bytes(weights)} of weights, bfloat16", ""]
    lines += [
        "*budget*: for the weights, plus what a pass takes beside them, is what narrowboat is given (the smallest it "
        "would take in brackets). *x bound*: over max(all on the device, bytes it copies / bandwidth); *x least*: "
        "with the bytes that nobody with that budget can avoid copying. *peak*: of the device, by the driver, beyond "
        "what resident's process takes beside tensors.",
        "",
    ]
    columns = ("budget", "batch", "all on device", "narrowboat", "x", "copied", "x bound", "x least")
    columns += ("best of the others", "it took", "peak", "same bits")
    for kind, words in (("host", "Weights in pinned host memory"), ("storage", "Weights on storage")):
        chosen = [cell for cell in cells if cell["kind"] == kind]
        if chosen:
            storage = derived["storage"].get(part)
            rate = f", storage {_rate(storage)}" if kind == "storage" else ""
            lines += [f"{words}{rate}:", "", *table(columns, (_row(cell) for cell in chosen)), ""]
    for cell in cells:
        if cell["kind"] == "unified" and cell["seconds"]:
            lines += [
                f"Unified memory forced, batch {cell['batch']}: {format_seconds(cell['seconds'])}, "
                f"{_times(cell['ratio'])} all on the device; same bits: {_said(cell['exact'])}.",
                "",
            ]
    lines += _peers(cells)
    lines += [
        f"- {record['subject']}{_at(record)}: {record['status']}{': ' if record['detail'] else ''}{record['detail']}"
        for record in mine
        if record.get("subject") and record["status"] != "ok"
    ]
    lines += [
        f"- {record['subject']}{_at(record)}, batch {batch['batch']}: {batch['status']}: {batch['detail']}"
        for record in mine
        for batch in record.get("batches", [])
        if batch["status"] != "ok"
    ]
    drift = derived.get("drift", {}).get(part)
    lines += [f"- plain PyTorch at the end over the beginning: {drift:.3f}"] if drift is not None else []
    return [*lines, ""]


def _at(record: dict[str, Any]) -> str:
    return f" at 1/{record['divisor']:g}" if record.get("divisor") else ""


def _row(cell: dict[str, Any]) -> tuple[str, ...]:
    if cell["seconds"] is None:
        return (f"1/{cell['divisor']:g}", str(cell["batch"]), _seconds(cell["resident_s"]), cell["status"], *[""] * 8)
    best = best_peer(cell)
    peak = cell["own_peak_bytes"]
    if cell["peak_bytes"] is not None and cell["libraries_bytes"] is not None:
        peak = cell["peak_bytes"] - cell["libraries_bytes"]
    budget = (
        f"1/{cell['divisor']:g}: {_bytes(cell['weights_budget_bytes'])}, in all {_bytes(cell['budget_bytes'])} "
        f"({_bytes(cell['least_budget_bytes'])}{', given' if cell['smallest'] else ''})"
    )
    return (
        budget,
        str(cell["batch"]),
        _seconds(cell["resident_s"]),
        f"**{_seconds(cell['seconds'])}**",
        _times(cell["ratio"]),
        _bytes(cell["copied_bytes"]),
        _times(cell["bound_ratio"]),
        _times(cell["least_ratio"]),
        LABELS.get(best[0], best[0]) if best else "-",
        f"{_seconds(best[1])}, {best[1] / cell['seconds']:.2f} x" if best else "-",
        _bytes(peak),
        _said(cell["exact"]),
    )


def _peers(cells: list[dict[str, Any]]) -> Lines:
    rows = []
    seen: set[tuple[str, ...]] = set()
    for cell in cells:
        plain = {"seconds": cell["resident_s"], "ratio": 1.0, "peak_bytes": cell["resident_peak_bytes"]}
        for name, peer in {"resident": {**plain, "difference": None}, **cell["peers"]}.items():
            if peer["seconds"]:
                row = (
                    LABELS.get(name, name),
                    f"1/{cell['divisor']:g}" if name in ("accelerate_placed", "flextensor") else "-",
                    str(cell["batch"]),
                    _seconds(peer["seconds"]),
                    _times(peer["ratio"]),
                    _bytes(peer["peak_bytes"]),
                    f"{peer['difference']:.0e}" if peer["difference"] else "none",
                )
                if row not in seen:
                    seen.add(row)
                    rows.append(row)
    columns = ("the others", "budget", "batch", "latency", "x", "device peak, all in all", "difference")
    return [*table(columns, sorted(rows)), ""] if rows else []


def _swap(swap: dict[str, Any] | None) -> Lines:
    if not swap:
        return []
    columns = ("chunk", "out", "out, with digests", "back", "a part out", "a part back", "memory exact", "same bytes")
    rows = [
        (
            _bytes(chunk["chunk"]),
            *(
                f"{_rate(chunk['rates'][name])} ({chunk['share'][name]:.2f})"
                for name in ("evict", "evict_call", "restore", "evict_part", "restore_part")
            ),
            _said(chunk["free_exact"]),
            _said(chunk["bytes_same"]),
        )
        for chunk in swap["chunks"]
    ]
    graph = swap["graph"]
    told = f"A captured graph replayed {graph['replays']} times right after a swap; same answer: " if graph else ""
    size = _bytes(swap["chunks"][0]["bytes"]) if swap["chunks"] else "-"
    return [
        f"## A task swapped: {size}",
        "",
        "In brackets the share of a pinned copy's bandwidth measured just before (out "
        f"{_rate(swap['bandwidth']['evict'])}, in {_rate(swap['bandwidth']['restore'])}). *out*: until the memory is "
        "others'; the call is back when the digests are made.",
        "",
        *table(columns, rows),
        "",
        *([told + _said(graph["same"]) + ".", ""] if graph else []),
    ]


def _tasks(records: dict[str, Any]) -> Lines:
    record = records.get("tasks/run")
    if record is None:
        return []
    lines = ["## Tasks on the device", ""]
    if "weights_bytes" not in record:
        return [*lines, f"**{record['status']}**: {record['detail']}", ""]
    total = sum(record["weights_bytes"].values())
    ratio = total / record["budget_bytes"]
    lines += [
        f"{len(record['weights_bytes'])} networks with {_bytes(total)} of weights in {_bytes(record['budget_bytes'])} "
        f"of the device ({ratio:.2f} times; asked for: {_bytes(record['asked_budget_bytes'])}). "
        f"Admitted: {_said(record.get('admitted'))}, with {record['stretched']} times the periods of a use of 40 %.",
        "",
    ]
    run, conform = ((record.get(name) or {}).get("document") or {} for name in ("run", "conform"))
    columns = ("task", "jobs", "late or unfinished", "median", "worst", "bound", "deadline")
    rows = [
        (
            task["name"],
            str(task["jobs"]),
            str(task["late"] + task["unfinished"]),
            *(_us(task[f"{name}_us"]) for name in ("median_response", "worst_response", "response_bound", "deadline")),
        )
        for task in run.get("tasks", [])
    ]
    lines += [*table(columns, rows), ""] if rows else [f"**{record['status']}**: {record['detail']}", ""]
    lines += [f"Guarantee {conform['wording']}.", ""] if conform else []
    broken = [p for p in conform.get("premises", []) if not p["holds"]]
    lines += [f"- {p['name']}: {p['said']}" for p in broken]
    said = [each["command"] for each in record.get("checks", [])[-1:]]
    said += [record[name]["command"] for name in ("run", "conform") if record.get(name)]
    return [*lines, *(f"- `{command}`" for command in said), ""]


def _training(derived: dict[str, Any], records: dict[str, Any]) -> Lines:
    rows = derived.get("training") or []
    if not rows:
        return []
    shape = next((r["shape"] for r in records.values() if r.get("part") == "training" and r.get("shape")), {})
    columns = ("step", "time", "x plain", "allocator's peak", "budget", "to the host", "gradients", "")
    body = [
        (
            row["setting"],
            _seconds(row["step_s"]),
            _times(row["ratio"]),
            _bytes(row["peak_bytes"]),
            _bytes(row["budget_bytes"]),
            _bytes(row["offloaded_bytes"]),
            "same bits" if row["same_bits"] else f"{row['difference']:.0e}" if row["difference"] is not None else "-",
            "" if row["status"] == "ok" else f"{row['status']}: {row['detail']}",
        )
        for row in rows
    ]
    said = ", ".join(f"{name} {value}" for name, value in shape.items())
    return ["## Training", "", f"A decoder, float32: {said}.", "", *table(columns, body), ""]


def _checks(checks: list[dict[str, Any]]) -> Lines:
    judged = [check["pass"] for check in checks if check["pass"] is not None]
    words = {True: "pass", False: "**FAIL**", None: "not judged here"}
    rows = [(words[check["pass"]], check["name"], str(check["value"]), str(check["target"])) for check in checks]
    return [
        f"## Checks: {sum(judged)} of {len(judged)} pass",
        "",
        *table(("", "what", "value", "target"), rows, left=4),
    ]


def _bytes(count: float | None) -> str:
    return "-" if count is None else format_bytes(count)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)


def _us(time: int | None) -> str:
    return "-" if time is None else format_seconds(time / 1e6)


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e9:.2f} GB/s"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _said(value: Any) -> str:
    return {True: "yes", False: "**no**", None: "-"}[value]
