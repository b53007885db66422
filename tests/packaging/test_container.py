"""The container file, read by a parser: there is no daemon to build it with. And its health check, run."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from narrowboat.serve.guard import door
from packaging_kit import ROOT

FILE = ROOT / "packaging" / "Containerfile"
CHECK = ROOT / "packaging" / "healthcheck.py"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Instruction and value of every step, in order."""
    parser = pytest.importorskip("dockerfile_parse", reason="dockerfile-parse is not installed")
    with FILE.open("rb") as file:
        read = parser.DockerfileParser(path=str(tmp_path_factory.mktemp("container")), fileobj=None, parent_env={})
        read.content = file.read().decode()
    return [step for step in read.structure if step["instruction"] != "COMMENT"]


def _values(steps: list[dict[str, str]], instruction: str) -> list[str]:
    return [step["value"] for step in steps if step["instruction"] == instruction]


def test_it_ends_as_a_user_without_rights_by_number(steps: list[dict[str, str]]) -> None:
    assert _values(steps, "USER") == ["10001:10001"]
    after = [step["instruction"] for step in steps[[s["instruction"] for s in steps].index("USER") + 1 :]]
    assert not {"RUN", "ADD"} & set(after)


def test_both_stages_are_the_same_slim_python(steps: list[dict[str, str]]) -> None:
    assert _values(steps, "ARG")[0] == "PYTHON=3.11"
    images = {value.partition(" AS ")[0] for value in _values(steps, "FROM")}
    assert images == {"docker.io/library/python:${PYTHON}-slim"}


def test_every_version_comes_from_the_constraints(steps: list[dict[str, str]]) -> None:
    installs = [value for value in _values(steps, "RUN") if "pip install" in value]
    assert len(installs) == 1
    assert "PIP_CONSTRAINT=/tmp/constraints.txt" in installs[0] and "narrowboat[serve] @ file://" in installs[0]
    assert "pip check" in installs[0]


def test_everything_that_is_copied_is_there_or_is_the_wheel(steps: list[dict[str, str]]) -> None:
    copied = [value.split()[0] for value in _values(steps, "COPY") if not value.startswith("--from")]
    assert "dist/narrowboat-*.whl" in copied
    assert [name for name in copied if "*" not in name and not (ROOT / name).is_file()] == []


def test_the_commands_of_its_steps_are_shell_without_mistakes(steps: list[dict[str, str]]) -> None:
    for value in _values(steps, "RUN"):
        done = subprocess.run(["sh", "-n", "-c", value], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_what_it_runs_is_narrowboat_and_its_health_is_the_gateways_own_route(steps: list[dict[str, str]]) -> None:
    assert json.loads(_values(steps, "ENTRYPOINT")[0]) == ["narrowboat"]
    assert _values(steps, "STOPSIGNAL") == ["SIGTERM"]
    command = json.loads(_values(steps, "HEALTHCHECK")[0].partition("CMD ")[2])
    assert command[-1] == _values(steps, "COPY")[-1].split()[-1]
    route = re.search(r'DEFAULT = "http://127.0.0.1:8000(\S+)"', CHECK.read_text())
    assert route is not None
    assert route[1] == door.LIVE


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/health/live" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def _check(url: str) -> int:
    # With a proxy that is none: the question must not go through it.
    environment = {"NARROWBOAT_HEALTH": url, "http_proxy": "http://127.0.0.1:1", "PATH": ""}
    return subprocess.run([sys.executable, str(CHECK)], env=environment, timeout=30, check=False).returncode


def test_the_check_passes_where_it_is_answered_and_fails_where_it_is_not(port: int) -> None:
    assert _check(f"http://127.0.0.1:{port}/v2/health/live") == 0
    assert _check(f"http://127.0.0.1:{port}/elsewhere") == 1
    assert _check("http://127.0.0.1:1/v2/health/live") == 1
    assert _check("no address") == 1
