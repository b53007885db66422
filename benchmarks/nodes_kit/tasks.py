"""Tasks on 1, 2, 3 nodes of a local cluster: requests per second, what the way costs, and what a killed node costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from narrowboat.checkpoint import open_index, pack
from narrowboat.cluster.gateway import ClusterGateway, serving
from narrowboat.cluster.link import pack_inputs, unpack_reply
from narrowboat.cluster.local import LocalCluster, local_cluster
from narrowboat.cluster.ray_cluster import RayCluster
from narrowboat.cluster.settings import ClusterSettings
from narrowboat.errors import NarrowboatError
from narrowboat.tasks.tensors import RawTensor
from narrowboat.zoo.save import save_random_weights

_CLIENTS = 12
_MIB = 1 << 20
_TASKS = """budget: 1MiB
margin: 4
tasks:
  - {{name: asked, model: zoo:mobilenet_v2, weights: {weights}, input: {{queue: q}},
     contract: {{burst: 2, period: 2s}}, deadline: 4s}}
  - {{name: free, model: zoo:mobilenet_v2, weights: {weights}, input: {{queue: q}},
     contract: {{burst: 40, period: 5ms}}, deadline: 200ms, guarantee: best-effort}}
"""


def throughput(folder: Path, nodes: int, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """A closed loop of clients to a best-effort task, once it runs on all nodes.

    Args:
        folder: for weights and description.
        nodes: of the cluster.
        seconds: of measuring.
        say: is told what happens.

    Returns:
        ``nodes``, ``requests_per_second``, ``median_ms``, ``allowed_way_ms``, ``way_median_ms`` (a request's time
        beside its node's response, without load) and ``way_longest_ms``.
    """
    path = _describe(folder)
    budget = _budget(folder)
    with local_cluster([(f"n{k}", budget) for k in range(nodes)]) as cluster:
        return asyncio.run(_throughput(path, cluster, nodes, seconds, say))


async def _throughput(
    path: Path, cluster: LocalCluster, nodes: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    async with serving(ClusterSettings(path, cluster.address), RayCluster(cluster.address), say) as gateway:
        inputs = _inputs(gateway)
        ways = []
        for _ in range(40):
            began = time.perf_counter()
            member = gateway.arrangement.homes("asked")[0]
            assert member.link is not None
            reply = unpack_reply(await member.link.call("infer", "free", pack_inputs(inputs), None, 0))
            ways.append((time.perf_counter() - began) * 1e3 - reply.response / 1e3)
        while len(gateway.arrangement.homes("free")) < nodes:
            if not await gateway.arrangement.more("free"):
                raise RuntimeError("the task finds no room on every node")
        done: list[float] = []
        stop = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < stop:
                began = time.perf_counter()
                await gateway.infer("free", inputs)
                done.append((time.perf_counter() - began) * 1e3)

        await asyncio.gather(*(client() for _ in range(_CLIENTS)))
        return {
            "nodes": nodes,
            "requests_per_second": len(done) / seconds,
            "median_ms": median(done),
            "allowed_way_ms": gateway.allowed / 1e3,
            "way_median_ms": median(ways[5:]),
            "way_longest_ms": max(ways[5:]),
        }


def kill(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The node of a guaranteed task is killed while it is asked twice a second.

    Returns:
        ``away_seconds`` from the kill to the next answer, ``refused`` requests meanwhile by their error,
        ``longest_seconds`` that any request took, ``wrong`` answers, ``moved`` tasks.
    """
    path = _describe(folder)
    budget = _budget(folder)
    with local_cluster([(f"n{k}", budget) for k in range(3)]) as cluster:
        return asyncio.run(_kill(path, cluster, say))


async def _kill(path: Path, cluster: LocalCluster, say: Callable[[str], None]) -> dict[str, Any]:
    async with serving(ClusterSettings(path, cluster.address), RayCluster(cluster.address), say) as gateway:
        inputs = _inputs(gateway)
        expected = bytes((await gateway.infer("asked", inputs)).outputs[0][1].data)
        refused: dict[str, int] = {}
        longest, wrong, last, back = 0.0, 0, 0.0, 0.0
        cluster.kill(gateway.arrangement.homes("asked")[0].name)
        began = time.monotonic()
        while time.monotonic() - began < 90 and (not back or time.monotonic() - back < 5):
            asked = time.monotonic()
            try:
                reply = await gateway.infer("asked", inputs)
                wrong += bytes(reply.outputs[0][1].data) != expected
                last = last or time.monotonic() - began
                back = back or time.monotonic()
            except NarrowboatError as error:
                refused[type(error).__name__] = refused.get(type(error).__name__, 0) + 1
            longest = max(longest, time.monotonic() - asked)
            await asyncio.sleep(0.5)
        return {
            "away_seconds": last,
            "refused": refused,
            "longest_seconds": longest,
            "wrong": wrong,
            "moved": gateway.arrangement.moved,
        }


def _inputs(gateway: ClusterGateway) -> dict[str, RawTensor]:
    spec = gateway.face("free").inputs[0]
    data = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32).tobytes()
    return {spec.name: RawTensor(spec.datatype, spec.shape, data)}


def _weights(folder: Path) -> Path:
    packed = folder / "mobilenet_v2.safetensors"
    if not packed.exists():
        plain = folder / "plain.safetensors"
        save_random_weights("mobilenet_v2", plain, overwrite=True)
        pack(plain, packed)
        plain.unlink()
    return packed


def _budget(folder: Path) -> int:
    """Room for the network whole, its activations and the slots of its queue."""
    return open_index(_weights(folder)).total_bytes * 2 + 400 * _MIB


def _describe(folder: Path) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(_TASKS.format(weights=_weights(folder)))
    return path
