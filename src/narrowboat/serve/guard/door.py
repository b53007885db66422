"""The door: every HTTP request comes in and every answer goes out through here. Plain ASGI, on the hot path."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.responses import Response

from narrowboat.errors import (
    BadRequestError,
    NotServingError,
    RequestError,
    TooLargeError,
    UnauthorizedError,
)
from narrowboat.serve.errors_http import OUTCOME, answer, unexpected
from narrowboat.serve.guard.connections import GONE
from narrowboat.serve.guard.hosts import Hosts
from narrowboat.serve.guard.limits import Meter, client_of
from narrowboat.serve.guard.rights import Right, right_for
from narrowboat.serve.guard.tokens import Caller, Tokens
from narrowboat.serve.interface import Gateway
from narrowboat.serve.logs import log
from narrowboat.serve.settings import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

WATCHING = "/v1/events"  # never ends by itself
LIVE, READY = "/v2/health/live", "/v2/health/ready"
_READ = frozenset(
    {b"host", b"origin", b"sec-fetch-site", b"authorization", b"content-length", b"x-request-id", b"transfer-encoding"}
)
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_ON_EVERY_ANSWER = [  # unless a room says otherwise
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
]
_STARTING_RETRY, _DRAINING_RETRY = 2.0, 5.0  # seconds


class Door:
    """Lets requests in to an app, or says why not.

    Args:
        app: the rooms.
        gateway: whose state decides.
        tokens: that are known.
        limits: on what clients may take.
        access_log: one line per request.

    Attributes:
        hosts: the names we go by; None (until the port is known) lets all in.
        meter: requests under way.
        draining: nobody is let in any more.
        working: requests under way that will end by themselves.
    """

    def __init__(
        self, app: App, gateway: Gateway, tokens: Tokens, limits: Limits, *, access_log: bool = False
    ) -> None:
        self.app = app
        self.gateway = gateway
        self.tokens = tokens
        self.limits = limits
        self.access_log = access_log
        self.hosts: Hosts | None = None
        self.meter = Meter(limits)
        self.draining = False
        self.working = 0
        self._id_prefix, self._ids = secrets.token_hex(4), itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; there are no WebSockets here
            await self.app(scope, receive, send)
            return
        visit = _Visit(self, scope, receive, send)
        try:
            await visit.run()
        finally:
            visit.leave()

    def make_id(self) -> str:
        """For a request whose client gave none."""
        return f"{self._id_prefix}-{next(self._ids):x}"

    def authorise(self, metadata: Mapping[str, str], right: str) -> None:
        """The same rules for a call of gRPC.

        Args:
            metadata: of it.
            right: that it needs, one of ``rights.Right``; any other word is "admin".

        Raises:
            UnauthorizedError, ForbiddenError: as :meth:`Tokens.authorise`.
            BeyondContractError: this client calls too often.
            NotServingError: the gateway ends.
        """
        needed: Right = "open" if right == "open" else "use" if right == "use" else "admin"
        given = metadata.get("authorization")
        caller = self.tokens.identify(None if given is None else given.encode("latin-1", "replace"))
        outcome = "let in"
        try:
            self.tokens.authorise(caller, needed)
            if needed != "open":
                if self.draining:
                    raise NotServingError("the gateway ends", retry_after=_DRAINING_RETRY)
                self.meter.charge((caller and caller.name) or "gRPC", time.monotonic())
        except RequestError as error:
            outcome = type(error).__name__
            if isinstance(error, UnauthorizedError):
                self.meter.charge("gRPC", time.monotonic())  # guessing has a price
            raise
        finally:
            if needed == "admin":
                log("admin", who=_name_of(caller), what="gRPC", outcome=outcome)


def _name_of(caller: Caller | None) -> str:
    """For the log."""
    return "unknown" if caller is None else caller.name or "anyone"


class _Visit:
    """One request, from the door to the door."""

    __slots__ = (
        "body_bytes",
        "caller",
        "client",
        "door",
        "entered",
        "id",
        "muted",
        "receive_raw",
        "refused",
        "right",
        "scope",
        "send_raw",
        "started",
        "status",
        "working",
    )

    def __init__(self, door: Door, scope: Scope, receive: Receive, send: Send) -> None:
        self.door, self.scope, self.receive_raw, self.send_raw = door, scope, receive, send
        self.started = time.monotonic()
        self.right: Right = "use"
        self.caller: Caller | None = None
        self.client = ""
        self.id = ""
        self.entered = self.working = self.muted = False
        self.refused: RequestError | None = None
        self.body_bytes = self.status = 0

    async def run(self) -> None:
        """Let it in, and answer what the app does not."""
        scope = self.scope
        try:
            self._let_in()
        except RequestError as error:
            scope[OUTCOME] = type(error).__name__
            await self._respond(answer(scope["path"], error))
            return
        try:
            await self.door.app(scope, self._receive, self._send)
        except asyncio.CancelledError:
            if GONE not in scope and not self.door.draining:
                raise
            scope[OUTCOME] = "gone"
        except Exception as error:
            scope[OUTCOME] = "InternalError"
            if not self.status:  # else the app has answered, and told the log
                log("failed", level=logging.ERROR, error=error, id=self.id, path=scope["path"])
                await self._respond(unexpected(scope["path"], self.id))

    def leave(self) -> None:
        """It is over, however it ended."""
        door = self.door
        if self.entered:
            door.meter.leave(self.client, self.body_bytes)
        if self.working:
            door.working -= 1
        if door.access_log or self.right == "admin":
            self._log()

    def _let_in(self) -> None:
        door, scope = self.door, self.scope
        method, path = scope["method"], scope["path"]
        self.right = right_for(method, path)
        headers: dict[bytes, bytes] = {}
        twice = None
        for name, value in scope["headers"]:
            if name in _READ:
                if name in headers:
                    twice = name
                headers[name] = value
        given = headers.get(b"x-request-id")
        self.id = given.decode() if given is not None and _SANE_ID.fullmatch(given) else door.make_id()
        scope.setdefault("state", {})["request_id"] = self.id
        if twice is not None:
            raise BadRequestError(f"the header {twice.decode()} is given more than once")
        if door.hosts is not None:
            door.hosts.check(headers.get(b"host"))
            if self.right != "open":
                door.hosts.check_origin(headers.get(b"host"), headers.get(b"origin"), headers.get(b"sec-fetch-site"))
        address = scope["client"][0] if scope.get("client") else None
        self.caller = door.tokens.identify(headers.get(b"authorization"))
        try:
            caller = door.tokens.authorise(self.caller, self.right)
        except UnauthorizedError:
            door.meter.charge(client_of("", address), self.started)  # guessing has a price
            raise
        self._check_state(path)
        if int(headers.get(b"content-length", b"0")) > door.limits.body_bytes:
            raise self._too_large()
        if self.right != "open":  # what is open costs nothing, and has to answer when all else is full
            self.client = client_of(caller.name, address)
            door.meter.enter(self.client, self.started)
            self.entered = True
            if path != WATCHING:
                door.working += 1
                self.working = True

    def _check_state(self, path: str) -> None:
        door = self.door
        if door.draining and (self.right != "open" or path == READY):
            raise NotServingError("the gateway ends; it takes no more requests", retry_after=_DRAINING_RETRY)
        state = door.gateway.state
        if state in ("starting", "stopped") and self.right != "open" and path not in (WATCHING, "/metrics"):
            said = door.gateway.said
            raise NotServingError(
                f"the gateway is {state}" + (f": {said}" if said else ""), retry_after=_STARTING_RETRY
            )

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is larger than the {self.door.limits.body_bytes} bytes that are taken")

    async def _receive(self) -> MutableMapping[str, Any]:
        message = await self.receive_raw()
        nbytes = len(message.get("body", b""))
        if nbytes:
            try:
                if self.body_bytes + nbytes > self.door.limits.body_bytes:
                    raise self._too_large()
                if self.entered:
                    self.door.meter.hold(nbytes)
                    self.body_bytes += nbytes
            except RequestError as error:
                self.refused = error  # should the app make something else of it
                raise
        return message

    async def _respond(self, response: Response) -> None:
        await response(self.scope, self.receive_raw, self._send_marked)

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if self.muted:
            return
        if self.refused is not None and not self.status:
            self.muted = True
            self.scope[OUTCOME] = type(self.refused).__name__
            await self._respond(answer(self.scope["path"], self.refused))
            return
        await self._send_marked(message)

    async def _send_marked(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
            said = {name for name, _ in headers}
            headers.extend(header for header in _ON_EVERY_ANSWER if header[0] not in said)
            message = {**message, "headers": headers}
        await self.send_raw(message)

    def _log(self) -> None:
        scope, door = self.scope, self.door
        route = scope.get("route")
        fields = {
            "id": self.id,
            "method": scope["method"],
            "path": getattr(route, "path", None) or scope["path"][:200],
            "status": self.status or None,
            "ms": round((time.monotonic() - self.started) * 1e3, 3),
            "task": _task_of(scope),
            "outcome": scope.get(OUTCOME) or scope["state"].get("outcome") or ("ok" if self.status else "gone"),
        }
        who = _name_of(self.caller)
        if door.access_log:
            log("request", who=who, **fields)
        if self.right == "admin":
            log("admin", who=who, what=f"{scope['method']} {scope['path'][:200]}", **fields)


def _task_of(scope: Scope) -> str | None:
    """The task that was asked for: a room says so in the request's state, or it is in the path."""
    told = scope["state"].get("task")
    if told is None:
        parameters = scope.get("path_params") or {}
        told = next((parameters[name] for name in ("task", "model", "name") if name in parameters), None)
    return None if told is None else str(told)[:200]
