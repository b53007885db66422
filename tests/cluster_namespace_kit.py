"""Machines of their own on this one: a network namespace for each, cables between them that can be cut, Ray on each.

Every namespace's name begins with a prefix that no other run of the tests has, and with that run's process, so that
what a killed run left behind is known and removed by the next. Processes of a machine live in a process namespace
whose first one ends when the tests' process ends: nothing outlives it, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster_driver_kit import Driver

_PREFIX = "nbtest"
_HUB = "hub"
_NETWORK = "192.0.2"  # TEST-NET-1 of RFC 5737, within the namespaces alone
_PORT = 6379
_STORE = 80 << 20
_WIRE = str(Path(__file__).with_name("cluster_wire_kit.py"))
_NEEDED = ("ip", "unshare", "nsenter", "setpriv")


def why_not_allowed() -> str:
    """Why there can be no network namespaces here; "" if there can."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)} (apt install iproute2 util-linux)"
    made = ["ip", "link", "add", "name", "switch", "type", "bridge"]
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", *made], capture_output=True, text=True, check=False
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Host:
    """One machine.

    Attributes:
        name: of it.
        space: its network namespace.
        address: in the network of all of them.
        served: the process that holds all of its others; None while it is off.
    """

    name: str
    space: str
    address: str
    served: subprocess.Popen[bytes] | None = None

    def processes(self) -> list[int]:
        """All that run there."""
        told = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, check=False)
        return [int(pid) for pid in told.stdout.split()]

    def executors(self) -> int:
        """Executors of narrowboat that run there: what the machine does, whatever the ingress thinks of it."""
        return sum("narrowboat.tasks.execute" in _command(pid) for pid in self.processes())

    def first(self) -> int:
        """The first process of its process namespace, as this machine numbers it."""
        assert self.served is not None
        children = Path(f"/proc/{self.served.pid}/task/{self.served.pid}/children")
        until = time.monotonic() + 10.0
        while not (found := children.read_text().split()):
            assert time.monotonic() < until and self.served.poll() is None, f"nothing starts on {self.name}"
            time.sleep(0.01)
        return int(found[0])


@dataclass
class Hosts:
    """Machines on one switch.

    Attributes:
        mark: that all names of this run begin with.
        folder: for files of theirs.
        environment: of their processes.
        by_name: the machines.
    """

    mark: str
    folder: Path
    environment: Mapping[str, str]
    by_name: dict[str, Host] = field(default_factory=dict)
    _wires: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _limping: dict[str, threading.Event] = field(default_factory=dict)

    # -- the network -----------------------------------------------------------------------------------

    def make_switch(self) -> None:
        """The machine in the middle."""
        hub = self.mark + _HUB
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "name", "switch", "type", "bridge", "forward_delay", "0")
        _ip("-n", hub, "link", "set", "dev", "switch", "up")

    def make(self, name: str) -> Host:
        """A machine with its cable."""
        number = len(self.by_name) + 1
        host = Host(name, self.mark + name, f"{_NETWORK}.{number}")
        hub = self.mark + _HUB
        _ip("netns", "add", host.space)
        self.by_name[name] = host
        _ip("-n", host.space, "link", "add", "name", "eth0", "type", "veth", "peer", "name", name, "netns", hub)
        _ip("-n", hub, "link", "set", "dev", name, "master", "switch", "up")
        _ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", host.space, "link", "set", "dev", interface, "up")
        # Leads nowhere: processes find out by it which address is theirs.
        _ip("-n", host.space, "route", "add", "default", "dev", "eth0")
        _within(host.space, sys.executable, _WIRE, "plain", "eth0")
        return host

    def cut(self, name: str) -> None:
        """Its cable is cut."""
        _ip("-n", self.mark + _HUB, "link", "set", "dev", name, "down")

    def mend(self, name: str) -> None:
        """Its cable is as good as any."""
        hub = self.mark + _HUB
        wire = self._wires.pop(name, None)
        if wire is not None:
            wire.kill()
            wire.wait()
            _ip("-n", hub, "link", "delete", "dev", f"{name}-in")
            _ip("-n", hub, "link", "set", "dev", name, "master", "switch")
        _ip("-n", hub, "link", "set", "dev", name, "up")

    def delay(self, name: str, seconds: float, ways: str = "both") -> None:
        """Each packet from it, and to it, is so long on its way.

        Of ``ways``, "there" carries its own packets alone, and "back" those of others to it.
        The cable is open for a moment while it is exchanged.
        """
        self.mend(name)
        hub = self.mark + _HUB
        inner, outer = f"{name}-in", f"{name}-out"
        _ip("-n", hub, "link", "add", "name", inner, "type", "veth", "peer", "name", outer)
        _within(hub, sys.executable, _WIRE, "plain", inner, outer)
        _ip("-n", hub, "link", "set", "dev", name, "nomaster")
        _ip("-n", hub, "link", "set", "dev", outer, "master", "switch", "up")
        _ip("-n", hub, "link", "set", "dev", inner, "up")
        command = ["ip", "netns", "exec", hub, sys.executable, _WIRE, "carry", name, inner, str(seconds), ways]
        wire = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdout=subprocess.PIPE)
        self._wires[name] = wire
        assert wire.stdout is not None and wire.stdout.readline() == b"carries\n"

    # -- how fast a machine is -------------------------------------------------------------------------

    def limp(self, name: str, seconds: float) -> None:
        """From now on it stands still for so long, runs for as long, stands still again."""
        over = self._limping[name] = threading.Event()
        host = self.by_name[name]

        def alternate() -> None:
            while not over.is_set():
                _send(host.processes(), signal.SIGSTOP)
                over.wait(seconds)
                _send(host.processes(), signal.SIGCONT)
                over.wait(seconds)

        threading.Thread(target=alternate, name=f"limp-{name}", daemon=True).start()

    def walk(self, name: str) -> None:
        """It runs as ever."""
        over = self._limping.pop(name, None)
        if over is not None:
            over.set()
            for thread in threading.enumerate():
                if thread.name == f"limp-{name}":
                    thread.join()
        _send(self.by_name[name].processes(), signal.SIGCONT)

    # -- what runs there -------------------------------------------------------------------------------

    def start_ray(self, name: str, *options: str) -> None:
        """Ray on a machine; ``--head`` among the options makes it the head."""
        host = self.by_name[name]
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address", host.address, "--object-store-memory", str(_STORE), *options]
        # Ray keeps a node's address in a file below its folder, which has to be each node's own.
        rays = Path(tempfile.gettempdir()) / "ray"
        rays.mkdir(exist_ok=True)
        own = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(folder), str(rays), *command]
        spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / f"{name}.log").open("ab") as log:
            host.served = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", host.space, *spaces, *own],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start_head(self, name: str) -> str:
        """The head's address."""
        options = ("--head", "--port", str(_PORT), "--num-cpus", "1", "--include-dashboard", "false")
        self.start_ray(name, *options)
        return f"{self.by_name[name].address}:{_PORT}"

    def start_node(self, name: str, address: str, resources: Mapping[str, float], label: str) -> None:
        """A node that joins the head at an address."""
        given = ("--resources", json.dumps(dict(resources)), "--labels", f"{label}={name}")
        self.start_ray(name, "--address", address, "--num-cpus", "1", *given)

    def drive(self, name: str, told: Mapping[str, Any]) -> Driver:
        """The driver, as one more process of a machine."""
        host = self.by_name[name]
        enter = ["nsenter", "--target", str(host.first()), "--net", "--pid", "--mount", f"--wd={os.getcwd()}", "--"]
        command = ["setpriv", "--pdeathsig", "KILL", *enter, sys.executable, *Driver.command(told)]
        return Driver(command, dict(self.environment), self.folder / f"{name}-driver.log")

    def off(self, name: str) -> None:
        """A machine without power."""
        host = self.by_name[name]
        if host.served is not None:
            host.served.kill()
            host.served.wait()
            host.served = None

    def close(self) -> None:
        """Nothing of it is left."""
        for name in list(self._limping):
            self.walk(name)
        for wire in self._wires.values():
            wire.kill()
            wire.wait()
        for name in self.by_name:
            self.off(name)
        _remove(self.mark)


@contextlib.contextmanager
def hosts(folder: Path, names: Sequence[str], environment: Mapping[str, str]) -> Iterator[Hosts]:
    """Machines that are on, with nothing running on them yet; those of killed runs are removed first.

    Args:
        folder: for their files; short, since sockets are below it.
        names: of them, at most eight letters each.
        environment: of all their processes.
    """
    for mark in _marks():
        owner = mark.removeprefix(_PREFIX).rstrip("-")
        if not Path(f"/proc/{owner}").exists():
            _remove(mark)
    made = Hosts(f"{_PREFIX}{os.getpid()}-", folder, environment)
    _remove(made.mark)
    try:
        made.make_switch()
        for name in names:
            made.make(name)
        yield made
    finally:
        made.close()


def _marks() -> set[str]:
    return {name[: name.index("-") + 1] for name in _spaces() if name.startswith(_PREFIX) and "-" in name}


def _spaces() -> list[str]:
    told = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    return [line.split()[0] for line in told.splitlines() if line.strip()]


def _remove(mark: str) -> None:
    for space in _spaces():
        if space.startswith(mark):
            told = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False).stdout
            _send([int(pid) for pid in told.split()], signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", space], check=False)


def _send(processes: Sequence[int], number: signal.Signals) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


def _within(space: str, *command: str) -> None:
    subprocess.run(["ip", "netns", "exec", space, *command], check=True)
