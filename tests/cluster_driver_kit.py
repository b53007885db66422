"""A deployment in a process of its own, told what to do by lines of JSON, and telling by lines of JSON what it sees.

Run as a script it is that process; imported it is the other end of its pipes.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any


class Driver:
    """The other end.

    Attributes:
        said: what the deployment told in words, with seconds by the monotonic clock.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.said: list[tuple[float, str]] = []
        self._log = log
        self._number = itertools.count()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._ready: Future[dict[str, Any]] = Future()
        threading.Thread(target=self._read, daemon=True).start()

    @staticmethod
    def command(told: Mapping[str, Any]) -> list[str]:
        """What Python runs."""
        return [str(Path(__file__).resolve()), json.dumps(dict(told))]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "said" in told and "number" not in told:
                self.said.append((told["at"], told["said"]))
            elif "number" in told:
                self._waiting.pop(told.pop("number")).set_result(told)
            else:
                self._ready.set_result(told)
        ended = RuntimeError(f"the driver has ended: {self._log.read_text()[-3000:]}")
        for future in [*self._waiting.values(), self._ready]:
            if not future.done():
                future.set_exception(ended)

    def ready(self, seconds: float) -> dict[str, Any]:
        """Once it serves: its plan."""
        return self._ready.result(seconds)

    def later(self, do: str, **more: Any) -> Future[dict[str, Any]]:
        """What comes of it."""
        number = next(self._number)
        future = self._waiting[number] = Future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"number": number, "do": do, **more}) + "\n")
        self._process.stdin.flush()
        return future

    def ask(self, do: str, seconds: float = 30.0, **more: Any) -> dict[str, Any]:
        """What has come of it within a time."""
        told = self.later(do, **more).result(seconds)
        assert "failed" not in told, told["failed"]
        return told

    def members(self) -> dict[str, dict[str, Any]]:
        """The nodes as the ingress keeps them, by name."""
        found: dict[str, dict[str, Any]] = self.ask("members")["members"]
        return found

    def homes(self, task: str) -> list[str]:
        """Nodes that were given a task."""
        return [name for name, member in self.members().items() if task in member["tasks"]]

    def end(self, seconds: float) -> int:
        """It closes the deployment and ends; its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(seconds)
        finally:
            self._process.kill()
            self._process.wait()


def _print(told: Mapping[str, Any]) -> None:
    os.write(_OUT, json.dumps(told).encode() + b"\n")


async def _serve(told: dict[str, Any]) -> None:
    from narrowboat.cluster.gateway import serving
    from narrowboat.cluster.ray_cluster import RayCluster
    from narrowboat.cluster.settings import ClusterSettings, Pace

    settings = ClusterSettings(
        Path(told["tasks"]), told["address"], pace=Pace(**told["pace"]), replicas=told.get("replicas")
    )

    def tell(said: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {said}", file=sys.stderr)
        _print({"said": said, "at": time.monotonic()})

    cluster = RayCluster(told["address"])
    await _until_there(cluster, told["nodes"])
    async with serving(settings, cluster, tell) as gateway:
        _print({"ready": gateway.plan()})
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        under_way = set()
        while line := await reader.readline():
            work = asyncio.create_task(_do(gateway, json.loads(line)))
            under_way.add(work)
            work.add_done_callback(under_way.discard)


async def _until_there(cluster: Any, nodes: int) -> None:
    """They have all joined; the head may still be starting."""
    from narrowboat.errors import NoClusterError

    async with asyncio.timeout(120):
        while True:
            try:
                await cluster.connect()
                if len(await cluster.machines()) >= nodes:
                    return
            except NoClusterError:
                pass
            await asyncio.sleep(0.3)


async def _do(gateway: Any, asked: dict[str, Any]) -> None:
    works = {"infer": _infer, "members": _members, "plan": _plan, "http": _http}
    try:
        found = await works[asked["do"]](gateway, asked)
    except Exception as error:
        found = {"failed": "".join(traceback.format_exception(error))}
    _print({"number": asked["number"], **found})


async def _infer(gateway: Any, asked: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from narrowboat.errors import NarrowboatError
    from narrowboat.tasks.tensors import RawTensor

    width = asked["width"]
    inputs = {"x": RawTensor("FP32", (1, width), np.ones((1, width), np.float32).tobytes())}
    began = time.monotonic()
    try:
        reply = await gateway.infer(asked["task"], inputs, timeout=asked.get("timeout"))
    except NarrowboatError as error:
        return {"outcome": type(error).__name__, "why": str(error), "seconds": time.monotonic() - began}
    return {
        "outcome": "answered",
        "seconds": time.monotonic() - began,
        "digest": hashlib.sha256(bytes(reply.outputs[0][1].data)).hexdigest(),
        "met": reply.met,
        "response": reply.response,
        "bound": reply.bound,
        "deadline": reply.deadline,
    }


async def _members(gateway: Any, asked: dict[str, Any]) -> dict[str, Any]:
    return {
        "members": {
            member.name: {
                "state": member.state,
                "said": member.said,
                "address": member.machine.address,
                "identity": member.machine.identity,
                "tasks": list(member.tasks),
                "learned": member.learned,
                "born": member.about.get("born", ""),
            }
            for member in gateway.members.values()
        }
    }


async def _plan(gateway: Any, asked: dict[str, Any]) -> dict[str, Any]:
    return {"plan": gateway.plan()}


async def _http(gateway: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """One request over HTTP, at a door like that of ``narrowboat deploy``."""
    import uvicorn

    from narrowboat.cluster.rooms import make_cluster_rooms
    from narrowboat.serve.settings import ServeSettings

    rooms = make_cluster_rooms(gateway, ServeSettings(tasks=Path("tasks.yaml")))
    door = uvicorn.Server(uvicorn.Config(rooms, log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}{asked['path']}"
        serving = asyncio.create_task(door.serve([listening]))
        try:
            return await asyncio.to_thread(_fetch, url, asked["body"])
        finally:
            door.should_exit = True
            await serving


def _fetch(url: str, body: Any) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return {"status": answer.status, "body": json.load(answer)}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "retry_after": error.headers.get("Retry-After"), "body": json.load(error)}


if __name__ == "__main__":
    _OUT = os.dup(1)
    os.dup2(2, 1)  # what others print is no line of ours
    asyncio.run(_serve(json.loads(sys.argv[1])))
