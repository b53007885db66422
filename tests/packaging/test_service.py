"""The systemd unit: accepted by systemd, and in step with what the code does and asks for."""

from __future__ import annotations

import configparser
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from narrowboat.cli import serve
from narrowboat.quantities import parse_bytes, parse_seconds
from narrowboat.serve import server
from narrowboat.tasks.execute import realtime
from packaging_kit import ROOT

FOLDER = ROOT / "packaging"
UNIT = FOLDER / "narrowboat.service"


def _settings(path: Path) -> dict[str, list[str]]:
    """Key: its values, of all sections."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_systemd_accepts_the_unit_and_its_drop_in(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # It looks for the program, which is here somewhere else; and for the manual page, which is not installed.
    text = UNIT.read_text().replace("/opt/narrowboat/bin/narrowboat", sys.executable)
    (tmp_path / UNIT.name).write_text("\n".join(x for x in text.splitlines() if not x.startswith("Documentation=")))
    shutil.copytree(FOLDER / "narrowboat.service.d", tmp_path / "narrowboat.service.d")
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "", "")


def test_it_may_have_the_real_time_priorities_that_the_executor_asks_for_and_no_others() -> None:
    settings = _settings(UNIT)
    assert settings["LimitRTPRIO"] == [str(max(realtime.COMPUTE, realtime.DISPATCH, realtime.LOAD))]
    assert settings["RestrictRealtime"] == ["no"]
    assert settings["CapabilityBoundingSet"] == settings["AmbientCapabilities"] == [""]
    assert settings["LimitMEMLOCK"] == ["infinity"]  # `PagePool(lock=True)` locks as much as its budget


def test_it_waits_longer_than_the_gateway_drains_and_closes() -> None:
    settings = _settings(UNIT)
    drain = re.search(r"--drain (\S+)", settings["ExecStart"][0])
    assert drain is not None
    needed = parse_seconds(drain[1], what="drain") + server._FLUSH + server._CLOSE
    assert parse_seconds(settings["TimeoutStopSec"][0], what="TimeoutStopSec") > needed
    assert settings["KillMode"] == ["mixed"]  # the executor is the gateway's to stop


def test_memory_is_a_wall_without_swap_above_the_budget_of_the_example() -> None:
    limit = parse_bytes(_settings(UNIT)["MemoryMax"][0].replace("M", "MiB"), what="MemoryMax")
    budget = re.search(r"^budget: (\S+)", (ROOT / "examples" / "serve" / "tasks.yaml").read_text(), re.MULTILINE)
    assert budget is not None
    assert limit > parse_bytes(budget[1], what="budget") + (450 << 20)
    assert _settings(UNIT)["MemorySwapMax"] == ["0"]
    assert "MemoryHigh" not in _settings(UNIT)


def test_it_starts_and_reloads_as_the_command_line_understands() -> None:
    settings = _settings(UNIT)
    options = {
        declared
        for parameter in inspect.signature(serve.serve).parameters.values()
        for note in getattr(parameter.annotation, "__metadata__", ())
        if isinstance(note, typer.models.OptionInfo)
        for declared in note.param_decls or ()
    } | {f"--{name.replace('_', '-')}" for name in inspect.signature(serve.serve).parameters}
    told = [settings["ExecStart"][0], (FOLDER / "narrowboat.env").read_text()]
    assert set(re.findall(r"--[a-z-]+", " ".join(told))) <= options
    assert settings["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert settings["RestartPreventExitStatus"] == ["2"]
    caches = [value for value in settings["Environment"] if "NARROWBOAT_CACHE=%C/narrowboat" in value]
    assert caches and settings["CacheDirectory"] == ["narrowboat"]


def test_what_would_break_the_executor_is_not_forbidden() -> None:
    settings = _settings(UNIT)
    assert "MemoryDenyWriteExecute" not in settings  # oneDNN writes its kernels
    assert settings["ProcSubset"] == ["all"]  # /proc/meminfo
    assert settings["SystemCallFilter"] == ["@system-service"]
    assert {"AF_INET", "AF_UNIX"} <= set(settings["RestrictAddressFamilies"][0].split())


def test_the_environment_file_is_one_that_systemd_reads() -> None:
    parser = configparser.RawConfigParser()
    parser.read_string("[env]\n" + (FOLDER / "narrowboat.env").read_text())
    assert parser["env"]["narrowboat_tasks"] == "/etc/narrowboat/tasks.yaml"
