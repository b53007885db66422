"""Sockets: bound before anything starts, and turned into connections that are counted from the first byte."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import ssl
from collections.abc import Callable

from narrowboat.errors import PortInUseError, ServeError, UsageError
from narrowboat.serve.guard.connections import GuardedProtocol
from narrowboat.serve.logs import log
from narrowboat.serve.settings import Limits

_BACKLOG = 1024
_OTHER_FILES = 512  # of the executor's channels, gRPC, the log
_PAUSE = 0.1  # seconds after a connection that could not be accepted, for lack of descriptors say


def bind(family: socket.AddressFamily, address: str, port: int, *, option: str) -> socket.socket:
    """A socket that listens.

    Args:
        family: of the address.
        address: literal.
        port: 0 has the kernel choose one.
        option: of the command line that says the port, for the message.

    Raises:
        PortInUseError: another program listens there.
        UsageError: it is no address of this machine.
        ServeError: it may not be used.
    """
    made = socket.socket(family, socket.SOCK_STREAM)
    where = f"{address}, port {port}"
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address == "::" else 1)
        made.bind((address, port))
        made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"{where}: another program listens there: end it, or give {option} another port (0: any that is free)"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"--host {address}: no address of this machine") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ServeError(f"{where}: needs more rights; ports from 1024 up need none: {option}") from error
        raise ServeError(f"{where}: {error.strerror}") from error
    return made


def allow_descriptors(connections: int) -> None:
    """Raise this process's limit of open files, as far as it may be, to hold so many connections and more.

    Many systems begin with 1024, which as many connections would use up.
    """
    wanted = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log("few descriptors", level=logging.WARNING, allowed=allowed, wanted=wanted)


class Listener:
    """Accepts connections on a socket. TLS handshakes count as connections, and have the time of header fields.

    Args:
        bound: the socket; it is closed in the end.
        protocol: makes a connection's.
        count: connections that are open.
        limits: on them.
        context: for TLS; None for plain HTTP.
    """

    def __init__(
        self,
        bound: socket.socket,
        protocol: Callable[[], GuardedProtocol],
        count: Callable[[], int],
        limits: Limits,
        context: ssl.SSLContext | None,
    ) -> None:
        self._socket, self._protocol, self._count = bound, protocol, count
        self._limits, self._context = limits, context
        self._server: asyncio.AbstractServer | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._shaking: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Accept from now on."""
        loop = asyncio.get_running_loop()
        if self._context is None:
            self._server = await loop.create_server(self._protocol, sock=self._socket, backlog=_BACKLOG)
        else:
            self._accepting = loop.create_task(self._accept(self._context))

    async def close(self) -> None:
        """Accept no more."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._shaking, *([self._accepting] if self._accepting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()

    async def _accept(self, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._socket)
            except OSError:
                await asyncio.sleep(_PAUSE)
                continue
            if len(self._shaking) + self._count() >= self._limits.connections:
                accepted.close()  # without TLS there is no way to say why
                continue
            task = loop.create_task(self._shake(accepted, context))
            self._shaking.add(task)
            task.add_done_callback(self._shaking.discard)

    async def _shake(self, accepted: socket.socket, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, TimeoutError):  # ssl.SSLError is an OSError; uvloop closes the socket
            await loop.connect_accepted_socket(
                self._protocol,
                accepted,
                ssl=context,
                ssl_handshake_timeout=self._limits.header_seconds,
                ssl_shutdown_timeout=self._limits.write_seconds,
            )
            return
        accepted.close()
