"""``narrowboat deploy``: tasks on the nodes of a Ray cluster."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowboat.cli.output import console, make_table, print_json
from narrowboat.cli.serve import (
    AccessLog,
    Certificate,
    Drain,
    GrpcPort,
    Host,
    HttpPort,
    Key,
    Level,
    LogLevel,
    TokensFile,
    announce,
    grpc_port_of,
    need_packages,
    teller,
)
from narrowboat.quantities import format_bytes, format_seconds, parse_seconds


def deploy(
    tasks: Annotated[Path, typer.Argument(metavar="TASKS.yaml", help="The tasks; see docs/tasks.md.")],
    address: Annotated[
        str, typer.Option(metavar="HEAD:PORT", help="Of the Ray cluster; auto: the one that this machine is in.")
    ] = "auto",
    check: Annotated[bool, typer.Option("--check", help="Say what would go where, and start nothing.")] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Deploy what has a place, even if a guaranteed task has none.")
    ] = False,
    ingress: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="That a request's way to a node and back is allowed. [default: measured]"),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Most nodes that run one best-effort task. [default: all]")
    ] = None,
    host: Host = "127.0.0.1",
    port: HttpPort = 8000,
    grpc_port: GrpcPort = None,
    tokens: TokensFile = None,
    certificate: Certificate = None,
    key: Key = None,
    drain: Drain = "30s",
    log_level: LogLevel = Level.INFO,
    access_log: AccessLog = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON line when it serves, or what --check finds.")] = False,
) -> None:
    """Place tasks on the nodes of a Ray cluster and serve them: each node keeps its own promises in its own bytes.

    A node gives memory by the Ray resource narrowboat_memory, in bytes. This process is the door to all of them; when
    it ends, so does what it has started. Signal HUP has TASKS read again.

    Exit code 1 if a guaranteed task has no place, or it cannot be started.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read again
    chosen = grpc_port_of(grpc_port, port)
    from narrowboat.cluster.ray_cluster import RayCluster, require_ray

    require_ray()
    need_packages(grpc=chosen is not None)
    from narrowboat.cluster.gateway import ClusterGateway
    from narrowboat.cluster.rooms import make_cluster_rooms
    from narrowboat.cluster.settings import ClusterSettings
    from narrowboat.serve import logs
    from narrowboat.serve.server import run_server
    from narrowboat.serve.settings import ServeSettings

    settings = ClusterSettings(
        tasks,
        address,
        None if ingress is None else round(parse_seconds(ingress, what="--ingress") * 1e6),
        partial,
        replicas=replicas,
    )
    logs.set_up(log_level.value)
    tell = teller(json)

    if check:
        found = asyncio.run(_check(ClusterGateway(settings, RayCluster(address), tell)))
        if json:
            print_json(found)
        else:
            _show(found)
        if not found["admitted"]:
            raise typer.Exit(1)
        return
    served = ServeSettings(
        tasks=tasks,
        host=host,
        port=port,
        grpc_port=chosen,
        tokens=tokens,
        certificate=certificate,
        key=key,
        drain_seconds=parse_seconds(drain, what="--drain"),
        access_log=access_log,
    )
    if not run_server(
        served,
        lambda _, said: ClusterGateway(settings, RayCluster(address), said),
        tell,
        lambda addresses: announce(addresses, json),
        make_cluster_rooms,
    ):
        raise typer.Exit(1)


async def _check(gateway: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = await gateway.check()
    finally:
        await gateway.close()
    return found


def _show(found: dict[str, Any]) -> None:
    screen = console()
    nodes = [[n["name"], n["state"], format_bytes(n["budget_bytes"]), n["said"]] for n in found["nodes"]]
    screen.print(make_table("nodes", ["node", "state", "budget", ""], nodes))
    rows = []
    for task, places in found["placement"].items():
        why = "; ".join(f"{node}: {said}" if node else said for node, said in found["refused"].get(task, {}).items())
        rows.append([task, ", ".join(places) or "nowhere", why])
    screen.print(make_table("tasks", ["task", "on", "why not"], rows))
    screen.print(f"the way to a node and back is allowed {format_seconds(found['ingress_us'] / 1e6)}", highlight=False)
