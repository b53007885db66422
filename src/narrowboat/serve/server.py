"""The gateway's process: binds, starts, serves HTTP and gRPC on one event loop, drains, ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Protocol

import uvicorn
import uvloop
from fastapi import FastAPI
from uvicorn.server import ServerState

from narrowboat.errors import ServeError
from narrowboat.serve.app import App, make_app, make_rooms
from narrowboat.serve.guard.connections import GuardedProtocol
from narrowboat.serve.guard.hosts import Hosts, require_safe, resolve
from narrowboat.serve.guard.listeners import Listener, allow_descriptors, bind
from narrowboat.serve.guard.tls import Identity, load_identity
from narrowboat.serve.guard.tokens import Tokens, load_tokens
from narrowboat.serve.interface import Gateway
from narrowboat.serve.logs import log
from narrowboat.serve.settings import ServeSettings

_LOOK = 0.02  # seconds between looks at what is still under way
_FLUSH = 1.0  # seconds for answers that are written to go out, in the end
_CLOSE = 10.0  # seconds for a gateway to close


class ServedGateway(Gateway, Protocol):
    """A gateway with a life of its own."""

    async def start(self) -> None:
        """Start the executor; returns when requests are let in. Raises NarrowboatError."""

    async def drain(self, seconds: float) -> None:
        """Let nothing in, and end when what is under way has, or after so many seconds."""

    async def close(self) -> None:
        """End at once, whatever is under way."""

    async def reload(self) -> None:
        """Read the file of tasks again. Raises NarrowboatError."""


class GrpcServer(Protocol):
    """What of ``grpc.aio.Server`` is used."""

    async def stop(self, grace: float | None) -> None:
        """Let nothing in, and end when what is under way has, or after so many seconds."""


@dataclass(frozen=True)
class Addresses:
    """Where a gateway serves.

    Attributes:
        http: as a URL.
        grpc: as gRPC's clients write it; None if it is off.
    """

    http: str
    grpc: str | None


class Server:
    """One gateway, from bound sockets to the end.

    Args:
        settings: of it.
        make_gateway: makes what answers.
        tell: is told in words what goes on before it serves.
        rooms: makes what is behind the door.

    Raises:
        UsageError, InsecureAddressError, TokenFileError, CertificateError, PortInUseError: before anything starts.
    """

    def __init__(
        self,
        settings: ServeSettings,
        make_gateway: Callable[[ServeSettings, Callable[[str], None]], ServedGateway],
        tell: Callable[[str], None],
        rooms: Callable[[Gateway, ServeSettings], FastAPI] = make_rooms,
    ) -> None:
        self.settings = settings
        family, address = resolve(settings.host, settings.port)
        self._identity: Identity | None = None
        if settings.certificate is not None and settings.key is not None:
            self._identity = load_identity(settings.certificate, settings.key)
        tokens: Tokens = load_tokens(settings.tokens)
        require_safe(settings.host, address, tokens=bool(tokens), tls=self._identity is not None)
        with contextlib.ExitStack() as undo:
            self._http = bind(family, address, settings.port, option="--port")
            undo.callback(self._http.close)
            # gRPC binds by itself. The port is held for it until then, so that it is ours or the failure is now.
            self._grpc_held = None
            if settings.grpc_port is not None:
                self._grpc_held = bind(family, address, settings.grpc_port, option="--grpc-port")
                undo.callback(self._grpc_held.close)
            self.gateway = make_gateway(settings, tell)
            self.app: App = make_app(self.gateway, settings, tokens, rooms)
            undo.pop_all()
        port = self._http.getsockname()[1]
        tls = self._identity is not None
        self.app.door.hosts = Hosts(settings.host, address, port, tls=tls)
        grpc_port = self._grpc_held.getsockname()[1] if self._grpc_held is not None else None
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.addresses = Addresses(
            f"{'https' if tls else 'http'}://{host}:{port}", None if grpc_port is None else f"{host}:{grpc_port}"
        )
        self._grpc_address = f"[{address}]:{grpc_port}" if ":" in address else f"{address}:{grpc_port}"
        self._grpc: GrpcServer | None = None
        self.state = ServerState()
        self._listener: Listener | None = None
        self._told_to_end, self._hurry = asyncio.Event(), asyncio.Event()
        self._reloading: asyncio.Task[None] | None = None

    async def run(self, announce: Callable[[Addresses], None]) -> bool:
        """Serve until signal TERM or INT, then drain.

        Args:
            announce: is called when requests are let in.

        Returns:
            Whether all that was under way in the end had its time; a second signal takes it.

        Raises:
            NarrowboatError: the gateway could not be started, or has given up.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_unhandled)
        allow_descriptors(self.settings.limits.connections)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        clock = loop.create_task(self._tick())
        try:
            await self._listen()
            start = loop.create_task(self.gateway.start())
            if await self._unless_told_to_end(start):
                announce(self.addresses)
                log("serving", http=self.addresses.http, grpc=self.addresses.grpc)
                await self._unless_told_to_end(clock)
                await self._drain()
            return not self._hurry.is_set()
        finally:
            clock.cancel()
            await self._close()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """Drain and end; the second time, end at once."""
        if self._told_to_end.is_set():
            self._hurry.set()
        self._told_to_end.set()

    def reload(self) -> None:
        """Have the file of tasks read again, unless that is being done."""
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.get_running_loop().create_task(self._reload())

    async def _reload(self) -> None:
        try:
            await self.gateway.reload()
        except Exception as error:
            known = isinstance(error, ServeError) or type(error).__module__ == "narrowboat.errors"
            log(
                "reload",
                level=logging.ERROR,
                error=None if known else error,
                outcome=type(error).__name__,
                said=str(error),
            )
        else:
            log("reload", outcome="ok")

    async def _unless_told_to_end(self, task: asyncio.Task[Any]) -> bool:
        """Whether a task has ended by itself, before we were told to end. Raises what it raised."""
        told = asyncio.get_running_loop().create_task(self._told_to_end.wait())
        await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if task.done():
            await task
            return True
        task.cancel()
        await asyncio.wait({task}, timeout=_CLOSE)
        return False

    async def _tick(self) -> None:
        """Keeps the Date header, and looks whether the gateway has given up; once a second."""
        while True:
            self.state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
            if self.gateway.state == "stopped":
                raise ServeError(f"the gateway has stopped: {self.gateway.said}")
            await asyncio.sleep(1.0)

    # -- beginning -------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        limits, identity = self.settings.limits, self._identity
        config = uvicorn.Config(
            self.app,
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nobody stands before us whom we would believe who asks
            server_header=False,
            timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]  # any number of seconds will do
            interface="asgi3",
        )
        config.load()
        protocol = functools.partial(
            GuardedProtocol,
            limits=limits,
            config=config,
            server_state=self.state,
            app_state={},
            _loop=asyncio.get_running_loop(),
        )
        context = identity.context if identity is not None else None
        self._listener = Listener(self._http, protocol, lambda: len(self.state.connections), limits, context)
        await self._listener.start()
        if self._grpc_held is not None:
            from narrowboat.serve.oip.grpc import serve_grpc

            credentials = None
            if identity is not None:
                import grpc

                credentials = grpc.ssl_server_credentials([(identity.key, identity.certificate)])
            self._grpc_held.close()
            self._grpc = await serve_grpc(
                self.gateway,
                self._grpc_address,
                credentials=credentials,
                max_bytes=limits.body_bytes,
                authorise=self.app.door.authorise,
                max_calls=limits.requests,
                interceptors=_observers(self.gateway),
            )
        log("listening", http=self.addresses.http, grpc=self.addresses.grpc)

    # -- ending ----------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Let nobody in, and wait for those who are: at most as long as the settings say."""
        door, until = self.app.door, time.monotonic() + self.settings.drain_seconds
        door.draining = True
        log("draining", under_way=door.working, seconds=self.settings.drain_seconds)
        work: list[asyncio.Task[Any]] = [asyncio.create_task(self._wait_for_work())]
        if self._grpc is not None:
            work.append(asyncio.create_task(self._grpc.stop(self.settings.drain_seconds)))
        if not await self._all_ended(work, until) and door.working:
            log("cut off", level=logging.WARNING, requests=door.working)
        left = max(0.0, until - time.monotonic())
        if not self._hurry.is_set():
            await self._all_ended([asyncio.create_task(self.gateway.drain(left))], until + _FLUSH)

    async def _wait_for_work(self) -> None:
        while self.app.door.working:
            await asyncio.sleep(_LOOK)

    async def _all_ended(self, work: Sequence[asyncio.Task[Any]], until: float) -> bool:
        """Whether they did, before a time and before we were told to hurry; they are cancelled otherwise."""
        hurry = asyncio.create_task(self._hurry.wait())
        waiting: set[asyncio.Task[Any]] = set(work)
        while waiting and not hurry.done() and (left := until - time.monotonic()) > 0:
            done, _ = await asyncio.wait({*waiting, hurry}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            waiting -= done
        for task in (*waiting, hurry):
            task.cancel()
        for task, outcome in zip(work, await asyncio.gather(*work, return_exceptions=True), strict=True):
            if isinstance(outcome, Exception):
                log("draining failed", level=logging.ERROR, error=outcome, what=task.get_name())
        return not waiting

    async def _close(self) -> None:
        self.app.door.draining = True
        if self._listener is not None:
            await self._listener.close()
        self._http.close()
        if self._grpc_held is not None:
            self._grpc_held.close()
        if self._grpc is not None:
            await self._grpc.stop(0)
        for connection in list(self.state.connections):
            connection.shutdown()
        if not self._hurry.is_set():
            until = time.monotonic() + _FLUSH
            while self._still_written() and time.monotonic() < until:
                await asyncio.sleep(_LOOK)
        for connection in list(self.state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(0)  # for them to notice, and to end what they wait for
        tasks = [*self.state.tasks, *([self._reloading] if self._reloading is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await asyncio.wait_for(self.gateway.close(), _CLOSE)
        except TimeoutError:
            log("closing took too long", level=logging.ERROR, seconds=_CLOSE)

    def _still_written(self) -> bool:
        """Whether an answer that is complete has not gone out yet."""
        return any(connection.transport.is_closing() for connection in self.state.connections)


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What no task was there to hear: a line in the log, a traceback only where it is a fault of ours."""
    error = context.get("exception")
    ours = error is not None and not isinstance(error, OSError)
    log(
        "event loop",
        level=logging.ERROR if ours else logging.DEBUG,
        error=error if ours else None,
        said=f"{context.get('message', '')}" + ("" if error is None else f": {error}"),
    )


def run_server(
    settings: ServeSettings,
    make_gateway: Callable[[ServeSettings, Callable[[str], None]], ServedGateway],
    tell: Callable[[str], None],
    announce: Callable[[Addresses], None],
    rooms: Callable[[Gateway, ServeSettings], FastAPI] = make_rooms,
) -> bool:
    """Serve until told to end: :class:`Server`, on an event loop of its own."""
    server = Server(settings, make_gateway, tell, rooms)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(server.run(announce))


def _observers(gateway: object) -> list[Any]:
    """What watches over gRPC's calls, where the gateway has a watch."""
    from narrowboat.serve.watch.observe_grpc import ObserveGrpc

    watch = getattr(gateway, "watch", None)
    return [] if watch is None else [ObserveGrpc(watch)]
