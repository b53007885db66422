"""A node's executor as Ray Serve runs it: one replica, bound to its node, holding the node's bytes."""

from __future__ import annotations

from typing import Any

from narrowboat.cluster.link import Failure, pack_reply, unpack_inputs
from narrowboat.cluster.node import NodeExecutor
from narrowboat.errors import NarrowboatError, NodeVersionError

_OPEN = frozenset({"about", "echo", "beat", "learn", "fits", "put", "faces", "plan", "infer"})


class RayNode:
    """What Ray Serve calls.

    Args:
        name, budget, lease: see ``NodeExecutor``.
        version: of narrowboat at the ingress.
    """

    def __init__(self, name: str, budget: int, lease: float, version: str) -> None:
        from narrowboat import __version__

        self._refusal: NodeVersionError | None = None
        if __version__ != version:
            self._refusal = NodeVersionError(
                f"node {name} has narrowboat {__version__}, and the ingress {version}: install one version on both"
            )
        self._node = NodeExecutor(name, budget, lease)

    async def call(self, method: str, *arguments: Any) -> Any:
        """``("ok", result)``, or ``("failed", Failure)``: errors of ours keep their names on the way."""
        if self._refusal is not None:
            return "failed", Failure.of(self._refusal)
        if method not in _OPEN:
            raise AttributeError(f"a node has no method {method!r}")
        try:
            if method == "infer":
                task, inputs, timeout, priority = arguments
                reply = await self._node.infer(task, unpack_inputs(inputs), timeout, priority)
                return "ok", pack_reply(reply)
            return "ok", await getattr(self._node, method)(*arguments)
        except NarrowboatError as error:
            return "failed", Failure.of(error)

    async def __del__(self) -> None:
        # Ray Serve awaits this when it ends a replica in good order.
        await self._node.close()
