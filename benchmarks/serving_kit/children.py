"""Servers and clients as processes of their own, and what can be seen of them from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
START = 300.0  # seconds that a server may take until it serves: measuring networks takes most of them


class ServerFailedError(Exception):
    """A server did not come up, or ended by itself."""


class Served:
    """A server in a process of its own.

    Args:
        command: that starts it.
        port: of HTTP, at which it will be.
        ready: path that answers 200 when it serves.
        folder: in which it runs.

    Attributes:
        seconds_to_ready: from its start.
    """

    def __init__(
        self, command: Sequence[str], port: int, ready: str, folder: Path, more: Mapping[str, str] | None = None
    ) -> None:
        self.port = port
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "GOMP_SPINCOUNT": "1000",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            **(more or {}),
        }
        began = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said
        )
        try:
            self._wait(ready, began + START)
        except BaseException:
            self.close()
            raise
        self.seconds_to_ready = round(time.monotonic() - began, 3)

    def _wait(self, ready: str, until: float) -> None:
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ServerFailedError(f"it ended with {self.process.returncode}: {self.said()}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                if self.get(ready)[0] == 200:
                    return
            time.sleep(0.05)
        raise ServerFailedError(f"it does not serve after {START:g} s: {self.said()}")

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
        """Status and body. Raises OSError."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read()

    def metric(self, name: str) -> dict[str, float]:
        """A metric's values by their labels, as Prometheus is told."""
        found = {}
        for line in self.get("/metrics")[1].decode().splitlines():
            head, _, value = line.rpartition(" ")
            if head == name or head.startswith(name + "{"):
                found[head[len(name) :].strip("{}")] = float(value)
        return found

    def said(self) -> str:
        """The end of what it wrote."""
        self._said.seek(0)
        return self._said.read().decode("utf-8", "replace")[-1500:]

    @property
    def executor(self) -> int | None:
        """Process id of the executor, which is a child of the server's."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes()
                if parent == self.process.pid and b"narrowboat.tasks.execute" in words:
                    return int(entry.name)
        return None

    def close(self) -> None:
        """Ask it to end; end it if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._said.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start_load(
    port: int, streams: Sequence[Mapping[str, Any]], seconds: float, connections: int, **more: Any
) -> subprocess.Popen[str]:
    """A load generator that has begun; ``finish_load`` gives its figures."""
    plan = {"host": "127.0.0.1", "port": port, "streams": streams, "seconds": seconds, "connections": connections}
    plan = {**plan, "timeout": 30.0, **more}
    child = subprocess.Popen(
        [sys.executable, str(HERE / "load_client.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(plan))
    child.stdin.close()
    child.stdin = None  # communicate() would flush it again
    return child


def finish_load(child: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """Figures of a load generator, which may take so long."""
    try:
        said, _ = child.communicate(timeout=seconds)
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode:
        raise ServerFailedError(f"the load generator ended with {child.returncode}")
    figures: dict[str, Any] = json.loads(said)
    return figures


def load(
    port: int, streams: Sequence[Mapping[str, Any]], seconds: float, connections: int, **more: Any
) -> dict[str, Any]:
    """Figures of one load."""
    return finish_load(start_load(port, streams, seconds, connections, **more), seconds + 90)


def state_of(pid: int, port: int | None = None) -> dict[str, int]:
    """What a process holds: descriptors, threads, bytes, and connections of its port."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    found = {
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "rss_bytes": int(status["VmRSS"].split()[0]) << 10,
        "peak_bytes": int(status["VmHWM"].split()[0]) << 10,
    }
    if port is not None:
        found["connections"] = connections_of(port)
    return found


def connections_of(port: int) -> int:
    """Accepted connections of a port that have not been closed on both sides."""
    count = 0
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            # Neither listening nor waiting out what may still be on its way.
            count += int(words[1].rpartition(":")[2], 16) == port and words[3] not in ("0A", "06")
    return count


def shared_memory() -> set[str]:
    """Names in the system's shared memory."""
    folder = Path("/dev/shm")
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
