"""``narrowboat serve``: tasks over the network."""

from __future__ import annotations

import importlib.util
import json as json_lines
import os
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from narrowboat.cli.output import error_console
from narrowboat.errors import ServeError, UsageError
from narrowboat.quantities import parse_seconds

if TYPE_CHECKING:
    from narrowboat.serve.server import Addresses

_NEEDED = ("fastapi", "uvicorn", "httptools", "uvloop", "orjson", "prometheus_client", "jinja2", "PIL")
_FOR_GRPC = ("grpc", "google.protobuf")


class Level(StrEnum):
    """From where up the log is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


# What every door to tasks is told.
Host = Annotated[str, typer.Option(metavar="NAME", help="Name or address to listen on. Others need --tokens and TLS.")]
HttpPort = Annotated[int, typer.Option(help="For HTTP; 0 has the kernel choose one.")]
GrpcPort = Annotated[
    str | None, typer.Option(metavar="PORT", help="For gRPC; 0 as above, none for no gRPC. [default: --port + 1]")
]
TokensFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Bearer tokens, one a line: `use TOKEN` or `admin TOKEN`.")
]
Certificate = Annotated[Path | None, typer.Option(metavar="FILE", help="For TLS: certificate chain, PEM.")]
Key = Annotated[Path | None, typer.Option(metavar="FILE", help="For TLS: its private key, PEM.")]
Drain = Annotated[str, typer.Option(metavar="TIME", help="For requests under way when it is told to end.")]
LogLevel = Annotated[Level, typer.Option("--log-level", help="Of the log on stderr.")]
AccessLog = Annotated[bool, typer.Option("--access-log", help="Log every request.")]


def serve(
    tasks: Annotated[Path, typer.Argument(metavar="TASKS.yaml", help="The tasks; see docs/tasks.md.")],
    host: Host = "127.0.0.1",
    port: HttpPort = 8000,
    grpc_port: GrpcPort = None,
    tokens: TokensFile = None,
    certificate: Certificate = None,
    key: Key = None,
    models: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Clients may load models from here, besides those in TASKS.")
    ] = None,
    drain: Drain = "30s",
    log_level: LogLevel = Level.INFO,
    access_log: AccessLog = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line when it serves.")] = False,
) -> None:
    """Serve tasks over HTTP and gRPC, with a page to watch them; they run in a process of their own.

    Signal HUP has TASKS read again; TERM and Ctrl-C let what is under way end, twice do not. Tokens are also read
    from NARROWBOAT_TOKEN and NARROWBOAT_ADMIN_TOKEN.

    Exit code 1 if it cannot be started, gives up, or was told twice to end.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read again
    chosen = grpc_port_of(grpc_port, port)
    need_packages(grpc=chosen is not None)
    from narrowboat.serve import logs
    from narrowboat.serve.gateway import make_gateway
    from narrowboat.serve.server import run_server
    from narrowboat.serve.settings import ServeSettings

    settings = ServeSettings(
        tasks=tasks,
        host=host,
        port=port,
        grpc_port=chosen,
        tokens=tokens,
        certificate=certificate,
        key=key,
        models=models,
        drain_seconds=parse_seconds(drain, what="--drain"),
        access_log=access_log,
    )
    logs.set_up(log_level.value)
    tell = teller(json)
    if not run_server(settings, make_gateway, tell, lambda addresses: announce(addresses, json)):
        raise typer.Exit(1)


def teller(json: bool) -> Callable[[str], None]:
    """Says what goes on: to people on a terminal, otherwise into the log, which is set up already."""
    from narrowboat.serve import logs

    screen = error_console()

    def tell(said: str) -> None:
        if screen.is_terminal and not json:
            screen.print(said, highlight=False, markup=False)
        else:
            logs.log("progress", said=said)

    return tell


def announce(addresses: Addresses, json: bool) -> None:
    """Say where it serves, on stdout."""
    if json:
        told = {"http": addresses.http, "grpc": addresses.grpc, "pid": os.getpid()}
        sys.stdout.write(json_lines.dumps(told) + "\n")
    else:
        sys.stdout.write(f"serving {addresses.http}  (HTTP: Open Inference Protocol, OpenAI, the live page)\n")
        if addresses.grpc is not None:
            sys.stdout.write(f"serving {addresses.grpc}  (gRPC: Open Inference Protocol)\n")
    sys.stdout.flush()


def grpc_port_of(given: str | None, port: int) -> int | None:
    """The port for gRPC that --grpc-port and --port ask for; None for no gRPC. Raises UsageError."""
    if given is None:
        return port + 1 if 0 < port < 65535 else 0
    if given == "none":
        return None
    if not given.isascii() or not given.isdigit():
        raise UsageError(f"--grpc-port {given}: give a number, 0 to have the kernel choose one, or none")
    return int(given)


def need_packages(*, grpc: bool) -> None:
    """What serving needs is installed. Raises ServeError."""
    needed = (*_NEEDED, *(_FOR_GRPC if grpc else ()))
    missing = [name for name in needed if not _is_there(name)]
    if missing:
        raise ServeError(f"serving needs more packages ({', '.join(missing)}): pip install 'narrowboat[serve]'")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it
        return False
