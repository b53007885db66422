"""What the ingress knows of a node: calls that are answered, or fail by a name; and how they cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from narrowboat import errors
from narrowboat.cluster.machines import Machine
from narrowboat.errors import ClusterError, rebuilt
from narrowboat.serve.interface import Reply
from narrowboat.tasks.tensors import RawTensor, TensorSpec


class NodeLink(Protocol):
    """One node. Every call may raise NodeLostError, and the node's own NarrowboatErrors; none is retried."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """A method of ``node.NodeExecutor``."""

    async def close(self) -> None:
        """Have the node end what it runs for us."""


class Cluster(Protocol):
    """The nodes there are."""

    async def connect(self) -> None:
        """Join it. Raises NoClusterError."""

    async def machines(self) -> Sequence[Machine]:
        """Those that live and offer memory. Raises NoClusterError."""

    async def open(self, machine: Machine, lease: float) -> NodeLink:
        """Put our executor on one. Raises ClusterError, NodeLostError."""

    async def close(self) -> None:
        """Nothing of ours is left."""


_BUILTIN = {kind.__name__: kind for kind in (RuntimeError, ValueError, TypeError, IndexError, MemoryError)}
_PLAIN = (bool, int, float, str, dict, list, tuple, type(None))


@dataclass(frozen=True)
class Failure:
    """An error on its way from a node.

    Its class is looked up again where it arrives, so that a node with other classes can still say what is wrong.

    Attributes:
        kind: name of its class: one of ``narrowboat.errors``, or one of Python's that a model may raise.
        said: its message.
        more: what it tells beside.
    """

    kind: str
    said: str
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """From an error; what only makes sense in its own process stays there."""
        more = {name: value for name, value in vars(error).items() if isinstance(value, _PLAIN)}
        return cls(type(error).__name__, str(error), more)

    def error(self, where: str = "") -> Exception:
        """The error again; a ClusterError if its class is not known here.

        Args:
            where: put before its message.
        """
        said = f"{where}: {self.said}" if where else self.said
        kind = getattr(errors, self.kind, None) or _BUILTIN.get(self.kind)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return ClusterError(f"{said} ({self.kind})")
        return rebuilt(kind, (said,), dict(self.more))


Told = tuple[list[tuple[dict[str, Any], bytes]], dict[str, Any]]
"""A reply as it crosses: tensors with their bytes, and the rest."""


def pack_inputs(inputs: Mapping[str, RawTensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """For the way."""
    return {name: (raw.datatype, raw.shape, bytes(raw.data)) for name, raw in inputs.items()}


def unpack_inputs(told: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> dict[str, RawTensor]:
    """On the node."""
    return {name: RawTensor(datatype, tuple(shape), data) for name, (datatype, shape, data) in told.items()}


def pack_reply(reply: Reply) -> Told:
    """For the way back."""
    rest = {name: getattr(reply, name) for name in ("admitted", "bound", "deadline", "response", "met")}
    return [(spec.as_json(), bytes(raw.data)) for spec, raw in reply.outputs], rest


def unpack_reply(told: Told) -> Reply:
    """At the ingress."""
    outputs = []
    for shown, data in told[0]:
        spec = TensorSpec.from_json(shown)
        outputs.append((spec, RawTensor(spec.datatype, spec.shape, data)))
    return Reply(tuple(outputs), **told[1])
