"""HTTP/1.1 on one connection: uvicorn's protocol with a limit on everything that a client may draw out.

[Note: which timer runs when] A request is in its *head* from the connection (or its first byte) to the end of its
header fields, then in its *body*, each with a time of its own that starts once and is not put off by single bytes.
Between requests uvicorn's keep-alive timer runs. Timers are armed after a piece of data was parsed, so that a request
that comes in one piece, as most do, costs none. Writing has another timer: it starts when the client takes no more, or
when we have closed and it has not.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from narrowboat.errors import (
    BadRequestError,
    NotServingError,
    ProtocolVersionError,
    RequestError,
    RequestTimeoutError,
)
from narrowboat.serve.errors_http import error_body, error_headers
from narrowboat.serve.guard.rights import right_for
from narrowboat.serve.logs import log
from narrowboat.serve.settings import Limits

GONE = "narrowboat.gone"
"""Key of a request's scope: its client has gone, and its task was cancelled for that."""

_LINGER = 1.0  # seconds for a client to read why it was refused, before what it still sends resets the connection
_TLS_HANDSHAKE, _TLS_ALERT = b"\x16\x03", b"\x15\x03\x01\x00\x02\x02\x46"  # fatal: protocol version
_HTTP2_PREFACE = b"PRI * HTTP/2"


class _HeaderTooLargeError(RequestError):
    """More header fields than are taken."""

    status = 431


def _name_of(error: RequestError) -> str:
    return type(error).__name__.lstrip("_")


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        limits: that it keeps.
        uvicorns: what uvicorn's protocol takes.
    """

    def __init__(self, *, limits: Limits, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._limits = limits
        self._phase: Literal["idle", "head", "body", "refused"] = "idle"
        self._fresh = True  # nothing has come yet
        self._messages = 0  # that have come whole
        self._heads = 0  # that have begun
        self._fed = self._named = 0  # bytes of this head: that came in pieces, and in the fields that are whole
        self._discarded = 0  # bytes that came after their request was answered
        self._timer: asyncio.TimerHandle | None = None
        self._timed: tuple[str, int] | None = None  # what the timer is for
        self._writing: asyncio.TimerHandle | None = None
        self._served: tuple[RequestResponseCycle, asyncio.Task[None]] | None = None

    # -- the connection --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; too many are turned away."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self.connections.discard(self)
            self._refuse(NotServingError("too many connections are open; try again", retry_after=1), linger=False)
        else:
            self._time("head", self._limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone: nobody waits for its requests, so they end, unless they change what runs."""
        self._phase = "refused"
        self._untime()
        self._unset_keepalive_if_required()
        if self._writing is not None:
            self._writing.cancel()
        self.pipeline.clear()
        self._drop_served()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The gateway ends: close now, or after the answer that is under way."""
        if self.cycle is None or self.cycle.response_complete:
            self._end()
        else:
            self.cycle.keep_alive = False

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        self._end()

    # -- what comes ------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse a piece of what the client sends, and time the rest of it."""
        if self._phase == "refused":
            return
        self._unset_keepalive_if_required()
        if self._fresh:
            self._fresh = False
            if self._refuse_other_protocols(data):
                return
        heads = self._heads
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # it is answered as if it had not asked to
        except httptools.HttpParserError:
            self._refuse(BadRequestError("this is not HTTP/1.1 as it should be"))
        if self._phase == "refused" or self.transport.is_closing():
            self._untime()
            return
        if self._phase == "head" and heads == self._heads:
            self._fed += len(data)
            if self._fed > self._limits.header_bytes:
                self._refuse_head()
                return
        if self._phase == "body":
            self._time("body", self._limits.body_seconds)
        elif self._phase == "head" or self._is_idle():
            self._time("head", self._limits.header_seconds)
        else:
            self._untime()

    def _is_idle(self) -> bool:
        """Something came that was no request, and nothing is under way: an empty line, say."""
        return self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete)

    def _refuse_other_protocols(self, data: bytes) -> bool:
        if data.startswith(_TLS_HANDSHAKE):
            self._phase = "refused"
            self.transport.write(_TLS_ALERT)
            self._end(linger=True)
        elif data.startswith(_HTTP2_PREFACE):
            self._refuse(ProtocolVersionError("HTTP/2 is not spoken here: HTTP/1.1 is"))
        return self._phase == "refused"

    def on_message_begin(self) -> None:
        """A request's first byte."""
        if self._phase != "refused":
            super().on_message_begin()
            self._phase = "head"
            self._heads += 1
            self._fed = self._named = self._discarded = 0

    def on_url(self, url: bytes) -> None:
        """A piece of its target."""
        if self._phase != "refused":
            self._named += len(url)
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its fields."""
        self._named += len(name) + len(value) + 4
        if self._phase != "refused" and self._named <= self._limits.header_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All of its fields: it starts."""
        if self._phase == "refused":
            return
        if self._named > self._limits.header_bytes:
            self._refuse_head()
        elif self.parser.get_http_version() != "1.1":
            spoken = self.parser.get_http_version()
            self._refuse(ProtocolVersionError(f"HTTP/{spoken} is not spoken here: HTTP/1.1 is"))
        else:
            super().on_headers_complete()
            self._phase = "body"
            if self.parser.should_upgrade():
                self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A piece of its body; what comes after the answer is thrown away, within limits."""
        if self._phase == "refused":
            return
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > self._limits.body_bytes:
                self._phase = "refused"
                self._end()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of it has come."""
        if self._phase != "refused":
            super().on_message_complete()
            self._phase = "idle"
            self._messages += 1

    # -- what goes -------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        task = self.loop.create_task(cycle.run_asgi(app))
        self._served = cycle, task
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def on_response_complete(self) -> None:
        """An answer is written; the next request may start."""
        self._served = None
        super().on_response_complete()
        if self.transport.is_closing():
            self._time_writing()

    def pause_writing(self) -> None:
        """The client does not take what is written for it."""
        super().pause_writing()
        self._time_writing()

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._writing is not None and not self.transport.is_closing():
            self._writing.cancel()
            self._writing = None

    def _time_writing(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's own complaint, in our form."""
        self._refuse(BadRequestError(msg))

    # -- the end ---------------------------------------------------------------------------------------

    def _refuse_head(self) -> None:
        limit = self._limits.header_bytes
        self._refuse(_HeaderTooLargeError(f"the request line and header fields take more than {limit} bytes"))

    def _refuse(self, error: RequestError, *, linger: bool = True) -> None:
        """Say why, if it is this request's turn to be answered, and close."""
        if self.transport.is_closing():
            return
        whose, self._phase = self._phase, "refused"
        self._untime()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            own = whose == "body" and not self.pipeline and not self.cycle.response_started
            self.pipeline.clear()
            self._drop_served()
            if not own:  # answers go out in order: before this one's there is another's
                self.transport.abort()
                return
        log("refused", level=logging.DEBUG, outcome=_name_of(error), said=str(error))
        self.transport.write(self._refusal(error))
        self._end(linger=linger)

    def _refusal(self, error: RequestError) -> bytes:
        body = error_body("", error.status, _name_of(error), str(error))
        headers = [
            *self.server_state.default_headers,
            *((name.encode(), value.encode()) for name, value in error_headers(error).items()),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
            (b"connection", b"close"),
        ]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        return STATUS_LINE[error.status] + lines + b"\r\n" + body

    def _end(self, *, linger: bool = False) -> None:
        """Close once what is written has gone; a client that does not take it loses it."""
        self._untime()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if linger and self._writing is None and self.transport.can_write_eof():
            self.flow.resume_reading()
            self.transport.write_eof()
            self._writing = self.loop.call_later(_LINGER, self._linger_no_more)
        else:
            self._time_writing()
            self.transport.close()

    def _linger_no_more(self) -> None:
        self._writing = None
        self._end()

    def _drop_served(self) -> None:
        if self._served is None:
            return
        (cycle, task), self._served = self._served, None
        cycle.disconnected = True
        cycle.message_event.set()
        self.flow.resume_writing()
        if not cycle.response_complete and right_for(cycle.scope["method"], cycle.scope["path"]) != "admin":
            cycle.scope[GONE] = True  # type: ignore[literal-required]
            task.cancel()

    # -- time ------------------------------------------------------------------------------------------

    def _time(self, what: Literal["head", "body"], seconds: float) -> None:
        """Have the current request's head or body be there in so many seconds, counted once."""
        if self._timed == (what, self._messages):
            return
        self._untime()
        self._timed = (what, self._messages)
        self._timer = self.loop.call_later(seconds, self._too_slow, what, seconds)

    def _untime(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = self._timed = None

    def _too_slow(self, what: Literal["head", "body"], seconds: float) -> None:
        self._timer = self._timed = None
        if self.flow.read_paused:  # it is we who do not read
            self._time(what, seconds)
        elif self._fresh or (self.cycle is not None and self.cycle.response_complete and what == "body"):
            self._phase = "refused"
            self._end()
        else:
            part = {"head": "header fields", "body": "body"}[what]
            self._refuse(RequestTimeoutError(f"the {part} did not come whole within {seconds:g} s"))
