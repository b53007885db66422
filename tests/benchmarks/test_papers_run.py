"""The benchmark of the papers' claims: pages are written whole, failures are shown, one row runs alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from papers_kit.check import Bench, Check, CheckError
from papers_kit.claims import CLAIMS, chosen
from papers_kit.effort import QUICK
from papers_kit.energy import energy_joules
from papers_kit.report import BEGIN, MarkerError, as_json, counted, filled, page, write
from papers_kit.runner import judge, read_kept, run_checks
from papers_kit.verdicts import Kind

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "papers.py"
FACTS: dict[str, Any] = {
    "command": "python benchmarks/papers.py", "commit": "abc", "date": "2026-01-01", "seconds": 5.0, "effort": "quick",
    "effort_said": "little", "processor": "p", "cores": 2, "bandwidth_bytes_per_s": 1e9, "kernel": "6", "python": "3",
    "torch": "2", "spin": "1000", "omp": "1", "memory_limit": "memory cgroup",
}  # fmt: skip
TEXT = "".join(f"# {s}\n<!-- papers.py: {s} begins -->\nstale\n<!-- papers.py: {s} ends -->\nuntouched\n" for s in
               ("swapnet", "rtswap", "sage"))  # fmt: skip


def measured(**told: Any) -> dict[str, Any]:
    return {"measured": told, "error": "", "seconds": 1.0, "commit": "abc"}


def test_a_failed_check_and_one_that_was_not_run_are_both_in_the_table() -> None:
    told = {
        "machine": measured(gpu=False, energy=False, phone=False, darknet=False, torch="2"),
        "planning": {"measured": None, "error": "killed | for its memory", "seconds": 1.0, "commit": "abc"},
    }
    rows = judge(list(CLAIMS), told)
    kinds = {claim.id: verdict.kind for claim, verdict in rows}
    assert len(rows) == len(CLAIMS)
    assert kinds["swapnet.residual"] is Kind.FAILED and kinds["rtswap.gpu"] is Kind.CANNOT
    assert kinds["rtswap.frameworks"] is Kind.WORSE and kinds["sage.fold"] is Kind.NOT_RUN
    text = page(FACTS, rows)
    assert "**check failed**: killed \\| for its memory" in text and "1 check failed" in counted(rows)
    assert all(f"--only {claim.id}`" in text for claim in CLAIMS)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 6 for line in lines)
    record = as_json(FACTS, rows, told)
    assert len(record["claims"]) == len(CLAIMS) and json.dumps(record)


def test_tables_go_between_their_markers_and_nothing_else_is_touched() -> None:
    rows = judge(list(CLAIMS), {})
    once = filled(TEXT, FACTS, rows)
    assert "stale" not in once and once.count("untouched") == 3 and "`--only sage.fold`" in once
    assert filled(once, FACTS, rows) == once
    with pytest.raises(MarkerError, match=r"papers\.py: sage begins"):
        filled(TEXT.replace(BEGIN.format(system="sage"), ""), FACTS, rows)


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    write(tmp_path / "a" / "papers.md", "text")
    assert (tmp_path / "a" / "papers.md").read_text() == "text" and len(list((tmp_path / "a").iterdir())) == 1


def test_energy_is_counted_where_there_are_counters(tmp_path: Path) -> None:
    assert energy_joules(tmp_path) is None
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "energy_uj").write_text("2500000\n")
    assert energy_joules(tmp_path) == 2.5


def bench_of(tmp_path: Path) -> Bench:
    return Bench(QUICK, tmp_path, lambda said: None)


def test_checks_run_apart_and_what_they_told_is_kept_for_the_next_run(tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    def body(bench: Bench) -> dict[str, Any]:
        calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
        return {"pid": os.getpid()}

    def failing(bench: Bench) -> dict[str, Any]:
        raise CheckError("no such thing")

    checks = {"machine": Check(body, "one", 30), "planning": Check(failing, "another", 30)}
    claims = chosen(["rtswap.gpu", "swapnet.residual"])
    kept = tmp_path / "told.json"
    told = run_checks(claims, checks, bench_of(tmp_path), kept, resume=False, commit="a")
    assert told["machine"]["measured"]["pid"] != os.getpid()
    assert told["planning"]["measured"] is None and "no such thing" in told["planning"]["error"]
    again = run_checks(claims, checks, bench_of(tmp_path), kept, resume=True, commit="a")
    assert again["machine"] == told["machine"] and calls.read_text() == "x"
    run_checks(claims, checks, bench_of(tmp_path), kept, resume=True, commit="b")
    assert calls.read_text() == "xx"  # other code: measured anew
    kept.write_text('{"cut o')
    assert read_kept(kept) == {}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_one_row_runs_alone_and_is_told(tmp_path: Path) -> None:
    out = tmp_path / "papers.json"
    done = run("--quick", "--only", "rtswap.config,swapnet.residual", "--work", str(tmp_path / "w"), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    claims = json.loads(out.read_text())["claims"]
    assert {claim["id"]: claim["verdict"] for claim in claims} == {
        "rtswap.config": "agrees",
        "swapnet.residual": "agrees",
    }
    assert "2 claims: 2 agrees" in done.stdout
    unknown = run("--only", "sage.nothing")
    assert unknown.returncode == 2 and "no claim 'sage.nothing'" in unknown.stderr
