"""A Ray cluster: which nodes offer memory, and a link to each by Ray Serve.

Ray's resources are accounts, and hold nobody to them: what a node's executor takes is kept by narrowboat. Serve places
the replicas, starts them anew when their process dies, and carries the calls; its queues stay empty, its autoscaler
off, since admission is decided by the analysis.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from narrowboat import __version__
from narrowboat.cluster.link import Failure
from narrowboat.cluster.machines import Machine, living_machines
from narrowboat.cluster.settings import MEMORY
from narrowboat.errors import ClusterError, NarrowboatError, NoClusterError, NodeLostError
from narrowboat.serve.aside import aside

_PREFIX = "narrowboat-"
_REACH = 5.0  # seconds for a connection to its head
_CONNECT = 30.0  # seconds to reach a cluster
_ASK = 30.0  # seconds for one question to Ray, and for those before it
_MANY = 10_000  # calls of one node at once: its own gateway says when there are too many
_HELP = (
    "start each node with the bytes that it gives: ray start --address=HEAD:6379 "
    f"--resources='{{\"{MEMORY}\": 2147483648}}'"
)
_TOKEN = "A cluster that asks for a token wants RAY_AUTH_MODE=token, and its head's ~/.ray/auth_token, here too"
_ONE = threading.Lock()  # Ray Serve's calls that make deployments change what all threads share
T = TypeVar("T")


def require_ray() -> None:
    """Ray is installed.

    Raises:
        NoClusterError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise NoClusterError("several machines need Ray: pip install 'narrowboat[ray]'")


class RayCluster:
    """The nodes of a cluster that is running.

    Args:
        address: of its head, such as ``HEAD:6379``; "auto" for the one that this machine belongs to.

    Raises:
        NoClusterError: there is none, or its version is another.
    """

    def __init__(self, address: str = "auto") -> None:
        require_ray()
        self._address = address
        self._connected = False
        self._began_serve = False
        self._token = secrets.token_hex(3)  # apps of an ingress before this one may still be ending

    async def connect(self) -> None:
        """Join it. Raises NoClusterError."""
        try:
            await aside(self._connect, _CONNECT)
        except TimeoutError:
            raise NoClusterError(
                f"no Ray cluster answers at {self._address!r} within {_CONNECT:g} s: is it running, and reachable? "
                f"{_TOKEN}"
            ) from None

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray import serve
        from ray.exceptions import AuthenticationError

        try:
            if not ray.is_initialized():
                self._require_listener()
                ray.init(
                    address=self._address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=False,
                )
                self._connected = True
        except AuthenticationError as error:
            raise NoClusterError(f"the Ray cluster at {self._address!r} does not let us in. {_TOKEN}") from error
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise NoClusterError(
                f"no Ray cluster can be used at {self._address!r}: {said}; start one with `ray start --head`"
            ) from error
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self._began_serve = not _serve_runs()
        # No proxy of Serve's: requests come by narrowboat's own door.
        serve.start(proxy_location="Disabled")
        for name in list(serve.status().applications):
            if name.startswith(_PREFIX):  # left by an ingress that was killed
                serve.delete(name, _blocking=False)

    def _require_listener(self) -> None:
        """Somebody listens there: where nobody does, Ray's core ends this process instead of raising an error."""
        address = self._address
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS") or _last_address()
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            return  # Ray says what it thinks of it
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers at {address} ({error.strerror or error})") from error

    async def machines(self) -> Sequence[Machine]:
        """See ``link.Cluster``."""
        return await _asked(_machines, "which nodes there are")

    async def open(self, machine: Machine, lease: float) -> RayLink:
        """See ``link.Cluster``."""
        app = f"{_PREFIX}{self._token}-{machine.identity[:16]}"
        handle = await _asked(lambda: _deploy(app, machine, lease), f"to put an executor on node {machine.name}")
        return RayLink(machine, handle, app)

    async def close(self) -> None:
        """See ``link.Cluster``."""
        with contextlib.suppress(ClusterError):
            await _asked(self._close, "to end")

    def _close(self) -> None:
        import ray
        from ray import serve

        left = [name for name in serve.status().applications if not name.startswith(_PREFIX)]
        if self._began_serve and not left:
            serve.shutdown()
        if self._connected:
            ray.shutdown()


class RayLink:
    """See ``link.NodeLink``."""

    def __init__(self, machine: Machine, handle: Any, app: str) -> None:
        self._machine, self._handle, self._app = machine, handle, app

    async def call(self, method: str, *arguments: Any) -> Any:
        """See ``link.NodeLink``."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        response = self._handle.remote(method, *arguments)
        try:
            outcome, told = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayError, RayServeException) as error:
            said = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            raise NodeLostError(f"node {self._machine.name} gave no answer: {said.strip()}") from error
        if outcome == "failed":
            assert isinstance(told, Failure)
            raise told.error()
        return told

    async def close(self) -> None:
        """See ``link.NodeLink``."""
        from ray import serve

        with contextlib.suppress(ClusterError):
            await _asked(lambda: serve.delete(self._app, _blocking=False), "to end an executor")


def _last_address() -> str:
    """Of the cluster that was started last on this machine; "" if there was none."""
    try:
        return (Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _machines() -> list[Machine]:
    living = living_machines()
    if not living:
        raise NoClusterError("the Ray cluster has no node that lives")
    return [machine for machine in living if machine.budget > 0]


def no_memory_offered() -> NoClusterError:
    """What is said where nodes live, and none gives anything."""
    return NoClusterError(f"no node of the Ray cluster offers {MEMORY}: {_HELP}")


def _deploy(app: str, machine: Machine, lease: float) -> Any:
    from ray import serve

    from narrowboat.cluster.ray_node import RayNode

    deployment = serve.deployment(
        name="node",
        num_replicas=1,
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={
            "num_cpus": 0,
            "resources": {MEMORY: machine.budget},
            "label_selector": {"ray.io/node-id": machine.identity},
        },
    )(RayNode)
    target = serve.RunTarget(
        deployment.bind(machine.name, machine.budget, lease, __version__), name=app, route_prefix=None
    )
    return serve.run_many([target], wait_for_applications_running=False)[0].call


def _serve_runs() -> bool:
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


async def _asked(work: Callable[[], T], what: str) -> T:
    def one_by_one() -> T:
        with _ONE:
            return work()

    try:
        return await aside(one_by_one, _ASK)
    except TimeoutError:
        raise ClusterError(f"the Ray cluster was asked {what}, and said nothing for {_ASK:g} s") from None
    except NarrowboatError:
        raise
    except Exception as error:  # Ray's own have no common base
        raise ClusterError(f"the Ray cluster was asked {what}: {type(error).__name__}: {error}") from error
