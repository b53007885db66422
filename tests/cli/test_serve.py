"""``narrowboat serve``: options, addresses, exit codes. What is served is a fake."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvloop")

TESTS = str(Path(__file__).parents[1])
# The command in a process of its own, with a gateway that has no executor.
CHILD = f"""
import sys
sys.path.insert(0, {TESTS!r})
import narrowboat.serve.gateway as gateway
from narrowboat.cli.main import main
from serve_guard_kit import LivingGateway

class Told(LivingGateway):
    async def close(self):
        print("closed", *self.calls, self.settings.tasks, self.settings.drain_seconds, flush=True)

def make(settings, tell):
    tell("measuring")
    made = Told()
    made.settings = settings
    return made

gateway.make_gateway = make
main(sys.argv[1:])
"""


def served(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, "serve", "tasks.yaml", "--port", "0", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_says_where_it_serves_in_json_and_ends_well() -> None:
    with served("--grpc-port", "0", "--json", "--drain", "2s") as child:
        try:
            assert child.stdout is not None
            told = json.loads(child.stdout.readline())
            assert told["pid"] == child.pid and told["grpc"].startswith("127.0.0.1:")
            with urllib.request.urlopen(f"{told['http']}/v2/health/ready", timeout=20) as answer:
                assert answer.status == 200
            child.send_signal(signal.SIGHUP)
            child.send_signal(signal.SIGTERM)
            out, err = child.communicate(timeout=30)
        finally:
            child.kill()
    assert child.returncode == 0, err
    assert out.startswith("closed start") and out.endswith("drain tasks.yaml 2.0\n")
    events = [json.loads(line) for line in err.splitlines()]
    assert events[0] | {"event": "progress", "said": "measuring"} == events[0]


def test_it_says_where_it_serves_in_words() -> None:
    with served("--grpc-port", "none", "--log-level", "error") as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline().startswith("serving http://127.0.0.1:")
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=30)
        finally:
            child.kill()
    assert (child.returncode, err) == (0, "") and out.startswith("closed")


def test_a_port_in_use_is_one_line_and_exit_code_1(narrowboat: Callable[..., Any]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = narrowboat("serve", "tasks.yaml", "--port", port, "--grpc-port", "none")
        told = narrowboat("serve", "tasks.yaml", "--port", port, "--grpc-port", "none", "--json")
    assert done.code == 1 and f"port {port}" in done.err and done.err.count("\n") == 1
    assert told.code == 1 and told.json()["error"]["type"] == "PortInUseError"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "tokens"),
        (["--host", "no such host"], "host"),
        (["--grpc-port", "some"], "--grpc-port some"),
        (["--grpc-port", "-1"], "--grpc-port"),
        (["--port", "70000", "--grpc-port", "none"], "--port 70000"),
        (["--certificate", "a.pem"], "--key"),
        (["--drain", "soon"], "--drain"),
        (["--models", "nowhere"], "--models"),
    ],
)
def test_wrong_usage_is_exit_code_2(narrowboat: Callable[..., Any], arguments: list[str], said: str) -> None:
    done = narrowboat("serve", "tasks.yaml", "--port", "0", *arguments)
    assert done.code == 2 and said in done.err


def test_a_token_file_that_others_can_read_is_exit_code_1(narrowboat: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("use 0123456789abcdef\n")
    (tmp_path / "tokens").chmod(0o644)
    done = narrowboat("serve", "tasks.yaml", "--port", "0", "--tokens", tmp_path / "tokens")
    assert done.code == 1 and "chmod 600" in done.err and "0123456789abcdef" not in done.err


def test_missing_packages_are_one_line_that_says_what_to_install(
    narrowboat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fastapi" else real(name, *rest)
    )
    done = narrowboat("serve", "tasks.yaml")
    assert done.code == 1 and "pip install 'narrowboat[serve]'" in done.err and done.err.count("\n") == 1
