"""What a gateway is told at its start: where it listens, who may ask, and how much."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from narrowboat.errors import UsageError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What clients may take of the gateway. Times in seconds, sizes in bytes.

    Attributes:
        body_bytes: of one request.
        held_bytes: of all request bodies that are held at once.
        header_bytes: of a request's line and header fields.
        requests: under way at once, of all clients.
        requests_per_client: under way at once, of one.
        rate: requests per second of one client, over a longer time.
        burst: requests that one client may send at once.
        clients: whose rates are remembered; beyond it the one longest silent is forgotten.
        connections: open at once.
        header_seconds: from a request's first byte, or from the connection, to the end of its header fields.
        body_seconds: from there to the end of its body.
        write_seconds: in which a client has to take what is written for it.
        idle_seconds: that a connection is kept between requests.
        watchers: that follow the events at once.
    """

    body_bytes: int = 64 * MIB
    held_bytes: int = 256 * MIB
    header_bytes: int = 32 * 2**10
    requests: int = 512
    requests_per_client: int = 256
    rate: float = 5000.0
    burst: int = 1000
    clients: int = 4096
    connections: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    idle_seconds: float = 75.0
    watchers: int = 32

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise UsageError(f"the limit {limit.name} has to be a number above 0, not {value!r}")
        if self.held_bytes < self.body_bytes:
            raise UsageError(
                f"held_bytes ({self.held_bytes}) is below body_bytes ({self.body_bytes}): no such body would get in"
            )


@dataclass(frozen=True)
class ServeSettings:
    """All of it. Raises UsageError for what cannot be.

    Attributes:
        tasks: the file of tasks.
        host: name or address to listen on.
        port: for HTTP; 0 has the kernel choose one.
        grpc_port: likewise for gRPC; None for no gRPC.
        tokens: file of bearer tokens.
        certificate: file with the server's certificate and what leads to its authority, as PEM; with
        key: file with its private key.
        models: the folder that models may be loaded from, beside what the file of tasks names.
        drain_seconds: for requests that are under way when the gateway is told to end.
        access_log: one line per request.
        limits: of what clients may take.
    """

    tasks: Path
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    tokens: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    models: Path | None = None
    drain_seconds: float = 30.0
    access_log: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.host or any(c.isspace() or c == "/" for c in self.host):
            raise UsageError(f"--host {self.host!r} is no host name or address; 127.0.0.1 is this machine alone")
        for option, port in (("--port", self.port), ("--grpc-port", self.grpc_port)):
            if port is not None and not 0 <= port <= 65535:
                raise UsageError(f"{option} {port} is no port: 1 to 65535, or 0 to have the kernel choose one")
        if self.port and self.port == self.grpc_port:
            raise UsageError(f"HTTP and gRPC cannot both have port {self.port}: give --grpc-port another, or none")
        if (self.certificate is None) != (self.key is None):
            given, missing = ("--certificate", "--key") if self.key is None else ("--key", "--certificate")
            raise UsageError(f"{given} needs {missing} beside it")
        if self.models is not None and not self.models.is_dir():
            raise UsageError(f"--models {self.models} is no folder")
        if not 0 <= self.drain_seconds <= 3600:
            raise UsageError(f"--drain {self.drain_seconds:g} has to be between 0 s and an hour")
