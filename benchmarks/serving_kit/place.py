"""A folder with networks, their weights and descriptions of tasks; and the servers that are started there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from serving_kit.children import HERE, Served, free_ports

HEAD = "budget: {budget}\nmargin: 3\ncalibration: {calibration}\ntasks:\n"
# The tiny network is promised nothing: what it may take at the most on a shared core is longer than its period.
TINY = (
    '  - {name: tiny, model: "serve_nets:tiny", weights: tiny.safetensors, input: {queue: tiny}, '
    "guarantee: best-effort, contract: {burst: 512, period: 100us}, deadline: 50ms}\n"
)
# 80 requests a second beside three networks of 32 MiB, of which the budget holds a part.
BURST, TINY_PERIOD = 16, 12_500
GUARANTEED = {"radar": (2, 400_000), "lidar": (2, 500_000)}  # burst, period in microseconds
BEST_EFFORT = {"extra": (4, 250_000), "tiny": (BURST, TINY_PERIOD)}
OVERLOAD_BUDGET = "112MiB"


class Place:
    """A folder.

    Args:
        folder: made if it is not there.
        quick: measure networks for less time.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder = folder.resolve()
        self.calibration = "300ms" if quick else "3s"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "extra.npz").exists():  # the last that is written
            subprocess.run([sys.executable, str(HERE / "materials.py"), str(self.folder)], check=True, timeout=300)

    def known(self, name: str) -> tuple[list[np.ndarray], list[bytes]]:
        """Inputs of a network, and the bytes that each has to give."""
        with np.load(self.folder / f"{name}.npz") as held:
            return list(held["inputs"]), [answer.tobytes() for answer in held["answers"]]

    def tiny(self) -> Path:
        """The tiny network by itself, with a contract that never refuses what these loads ask for."""
        return self._write("tiny.yaml", HEAD.format(budget="64MiB", calibration=self.calibration) + TINY)

    def overload(self) -> Path:
        """Two guaranteed tasks that are swapped, two that are promised nothing."""
        lines = [HEAD.format(budget=OVERLOAD_BUDGET, calibration=self.calibration)]
        for name, (burst, period) in {**GUARANTEED, **BEST_EFFORT}.items():
            promise = "guaranteed" if name in GUARANTEED else "best-effort"
            lines.append(
                f'  - {{name: {name}, model: "serve_nets:{name}", weights: {name}.safetensors, '
                f"input: {{queue: {name}}}, guarantee: {promise}, contract: {{burst: {burst}, period: {period}us}}, "
                f"deadline: {burst * period}us}}\n"
            )
        return self._write("overload.yaml", "".join(lines))

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def narrowboat(self, tasks: Path) -> tuple[Served, int]:
        """A gateway that serves, and its port of gRPC."""
        port, grpc_port = free_ports(2)
        command = [sys.executable, "-m", "narrowboat", "serve", str(tasks), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--grpc-port", str(grpc_port)]
        cache = {"NARROWBOAT_CACHE": str(self.folder / "cache")}
        return Served(command, port, "/v2/health/ready", self.folder, cache), grpc_port

    def litserve(self) -> Served:
        """LitServe with the tiny network, as its own documentation starts it: one worker."""
        (port,) = free_ports(1)
        weights = self.folder / "tiny.safetensors"
        command = [sys.executable, str(HERE / "litserve_child.py"), str(weights), str(port)]
        return Served(command, port, "/health", self.folder)
