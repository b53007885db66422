"""A deployment on a real Ray cluster of three nodes on this machine: placed, served, killed, frozen, come back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster_fake_kit import until
from cluster_kit import MIB, LocalCluster, local_cluster
from narrowboat.cluster import ray_cluster
from narrowboat.cluster.gateway import ClusterGateway, serving
from narrowboat.cluster.ray_cluster import RayCluster
from narrowboat.cluster.settings import ROOT, ClusterSettings, Pace
from narrowboat.errors import ClusterError, NarrowboatError, NoClusterError
from narrowboat.tasks.tensors import RawTensor
from task_nets_kit import nets  # noqa: F401

pytestmark = pytest.mark.timeout(600)
PACE = Pace(beat=0.5, silent=4.0, lost=8.0, lease=40.0, patience=20.0, start=300.0)
HEAD = "budget: 1MiB\nmargin: 8\ncalibration: 100ms\ntasks:\n"
WIDE = (
    '  - {name: wide, model: "tasks_test_nets:wide", weights: wide.safetensors, input: {queue: q}, '
    "contract: {burst: 4, period: 2s}, deadline: 8s, pinned: true}\n"
)
ASKED = (
    '  - {name: asked, model: "tasks_test_nets:other", weights: other.safetensors, input: {queue: q}, '
    "contract: {burst: 20, period: 500ms}, deadline: 8s}\n"
)
FREE = (
    '  - {name: free, model: "tasks_test_nets:deep", weights: deep.safetensors, input: {queue: q}, '
    "contract: {burst: 200, period: 5ms}, deadline: 1s, guarantee: best-effort}\n"
)


@pytest.fixture(scope="module")
def cluster(nets: Path) -> Iterator[LocalCluster]:  # noqa: F811
    """Nodes a and b hold everything; c has room for the small networks alone, and another folder of weights."""
    bare = nets / "bare"
    bare.mkdir()
    (bare / "deep.safetensors").symlink_to(nets / "deep.safetensors")
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(nets)  # what runs on nodes imports the networks by name
    with local_cluster([("a", 80 * MIB), ("b", 70 * MIB)]) as made:
        made.add("c", 60 * MIB, environment={ROOT: str(bare)})
        yield made
    os.environ.clear()
    os.environ.update(before)


def described(nets: Path, *tasks: str) -> Path:  # noqa: F811
    path = nets / "cluster.yaml"
    path.write_text(HEAD + "".join(tasks))
    return path


def ones(width: int) -> dict[str, RawTensor]:
    return {"x": RawTensor("FP32", (1, width), np.ones((1, width), np.float32).tobytes())}


def homes(gateway: ClusterGateway, task: str) -> list[str]:
    return [member.name for member in gateway.arrangement.homes(task)]


def test_tasks_are_placed_within_budgets_served_moved_and_given_back(cluster: LocalCluster, nets: Path) -> None:  # noqa: F811
    import tasks_test_nets  # type: ignore[import-not-found]

    torch.manual_seed(len("other"))
    with torch.inference_mode():
        expected = tasks_test_nets.other()(torch.ones(1, 128)).numpy().tobytes()
    said: list[str] = []

    async def go() -> None:
        settings = ClusterSettings(described(nets, ASKED, FREE), cluster.address, pace=PACE)
        async with serving(settings, RayCluster(cluster.address), said.append) as gateway:
            plan = gateway.plan()
            assert plan["admitted"] and {node["name"] for node in plan["nodes"]} == {"a", "b", "c"}
            for node in plan["nodes"]:
                assert node["state"] == "ready" and node["needed_bytes"] <= node["budget_bytes"]
            missing = gateway.members[cluster.nodes["c"].identity].learned["asked"]["reason"]
            assert "weights file not found" in missing
            assert homes(gateway, "asked") == ["a"], "the largest node is tried first"

            reply = await gateway.infer("asked", ones(128))
            assert bytes(reply.outputs[0][1].data) == expected, "the same bits"
            assert reply.admitted and reply.bound is not None and reply.bound > gateway.allowed
            assert (await gateway.infer("free", ones(256))).outputs

            # A cut cable: nothing of node a says anything any more.
            cluster.nodes["a"].freeze()
            began, longest, outcomes = time.monotonic(), 0.0, []
            while homes(gateway, "asked") != ["b"] and time.monotonic() - began < 60:
                asked = time.monotonic()
                try:
                    await gateway.infer("asked", ones(128))
                    outcomes.append("answered")
                except NarrowboatError as error:
                    outcomes.append(type(error).__name__)
                longest = max(longest, time.monotonic() - asked)
                await asyncio.sleep(0.3)
            assert homes(gateway, "asked") == ["b"], said
            assert longest < PACE.lost + 2, "no request hangs"
            assert set(outcomes) <= {"answered", "NotServingError", "BeyondContractError"}
            await until(lambda: gateway.face("asked").ready, 60)
            assert bytes((await gateway.infer("asked", ones(128))).outputs[0][1].data) == expected

            # The cable is mended: what was moved is put down there, and is not moved back.
            cluster.nodes["a"].thaw()
            member = gateway.members[cluster.nodes["a"].identity]
            await until(lambda: member.state == "ready" and "asked" not in member.tasks, 60)
            await until(lambda: "asked" not in (member.tick.get("tasks") or {}), 60)
            assert homes(gateway, "asked") == ["b"]

            # Node b is killed with all that is on it.
            cluster.kill("b")
            await until(lambda: homes(gateway, "asked") == ["a"], 120)
            await until(lambda: gateway.face("asked").ready, 60)
            assert bytes((await gateway.infer("asked", ones(128))).outputs[0][1].data) == expected
            assert gateway.arrangement.moved >= 2

            # And the other one: nobody has room or weights for it now, which is said.
            cluster.kill("a")
            await until(lambda: "asked" in gateway.arrangement.refused, 120)
            assert "weights file not found" in gateway.face("asked").reason
            assert (await gateway.infer("free", ones(256))).outputs, "node c goes on"

            # A node comes back: what had no place is placed.
            cluster.add("a", 80 * MIB)
            await until(lambda: homes(gateway, "asked") == ["a"], 200)
            await until(lambda: gateway.face("asked").ready, 60)
            assert bytes((await gateway.infer("asked", ones(128))).outputs[0][1].data) == expected

    asyncio.run(go())
    assert not _executors(), "nothing is left on the nodes"


def test_a_process_that_is_killed_is_started_anew_with_its_tasks(cluster: LocalCluster, nets: Path) -> None:  # noqa: F811
    async def go() -> None:
        settings = ClusterSettings(described(nets, FREE), cluster.address, pace=PACE, replicas=1)
        async with serving(settings, RayCluster(cluster.address)) as gateway:
            member = gateway.arrangement.homes("free")[0]
            born = member.about["born"]
            os.kill(int(member.about["pid"]), signal.SIGKILL)
            await until(lambda: member.about["born"] != born, 120)
            await until(lambda: gateway.face("free").ready, 120)
            assert (await _in_the_end(gateway)).outputs

    asyncio.run(go())


async def _in_the_end(gateway: ClusterGateway) -> Any:
    for _ in range(60):
        try:
            return await gateway.infer("free", ones(256))
        except NarrowboatError:
            await asyncio.sleep(0.5)
    raise AssertionError("it does not come back")


def test_nodes_of_another_version_refuse_by_name(
    cluster: LocalCluster,
    nets: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_cluster, "__version__", "0.0.1")

    async def go() -> None:
        settings = ClusterSettings(described(nets, FREE), cluster.address, pace=PACE)
        async with serving(settings, RayCluster(cluster.address)):
            raise AssertionError

    with pytest.raises(ClusterError, match=r"has narrowboat .*, and the ingress 0\.0\.1: install one version"):
        asyncio.run(go())


def test_the_command_serves_over_http_and_leaves_nothing(cluster: LocalCluster, nets: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "narrowboat", "deploy", str(described(nets, FREE)), "--address", cluster.address]
    served = subprocess.Popen(
        [*command, "--port", "0", "--grpc-port", "none", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert served.stdout is not None
        line = served.stdout.readline()
        assert line, served.stderr.read() if served.stderr else ""
        url = json.loads(line)["http"]
        assert json.loads(_get(f"{url}/v2/health/ready"))["ready"]
        assert b"narrowboat cluster" in _get(f"{url}/")
        plan = json.loads(_get(f"{url}/v1/plan"))
        assert plan["tasks"][0]["nodes"]
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 256], "data": [1.0] * 256}]}
        told = json.loads(_get(f"{url}/v2/models/free/infer", body))
        assert len(told["outputs"][0]["data"]) == 256
        with pytest.raises(urllib.error.HTTPError) as caught:
            _get(f"{url}/v2/models/none/infer", body)
        assert caught.value.code == 404
        served.send_signal(signal.SIGTERM)
        assert served.wait(60) == 0
    finally:
        served.kill()
        served.communicate()
    assert not _executors()


def _get(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
        told: bytes = answer.read()
    return told


def _executors() -> list[str]:
    """Executors of narrowboat that run on this machine below a Ray worker."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if "narrowboat.tasks.execute" in line or "ServeReplica:narrowboat" in line:
                found.append(line)
        if not found:
            return []
        time.sleep(0.5)
    return found


def test_no_cluster_at_an_address_is_said_in_one_line() -> None:
    code = (
        "import asyncio; from narrowboat.cluster.ray_cluster import RayCluster\n"
        "try: asyncio.run(RayCluster('127.0.0.1:1').connect())\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "NoClusterError" in ended.stdout and "127.0.0.1:1" in ended.stdout, ended.stdout + ended.stderr


def test_without_ray_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoClusterError, match=r"pip install 'narrowboat\[ray\]'"):
        RayCluster()
