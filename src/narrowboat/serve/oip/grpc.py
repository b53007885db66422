"""The server for gRPC clients: ports, limits, and every call guarded and its errors told in one place."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import orjson
from google.protobuf.message import DecodeError

from narrowboat.errors import BadRequestError, PortInUseError, RequestError, RequestTimeoutError
from narrowboat.serve.interface import Gateway
from narrowboat.serve.oip.grpc_calls import CALLS, Calls
from narrowboat.serve.oip.messages import SERVICE, message

Authorise = Callable[[Mapping[str, str], str], None]
_LOG = logging.getLogger(__name__)
# Of the 8 KiB of metadata that clients take for sure (details travel as base64): beyond it, some calls fail otherwise.
_LONGEST_MESSAGE, _LONGEST_DETAILS = 2_000, 4_000
_HANDSHAKE_MS, _KEEPALIVE_MS, _IDLE_MS = 10_000, 60_000, 600_000
_OTHER = (
    "{method} is not known here; narrowboat speaks the Open Inference Protocol v2: the service "
    f"{SERVICE.full_name}, with ModelInfer and the rest"
)


@dataclass(frozen=True)
class GrpcServer:
    """A server that listens.

    Attributes:
        port: on which; the kernel's choice where 0 was asked for.
    """

    port: int
    _server: grpc.aio.Server

    async def stop(self, grace: float | None) -> None:
        """No new calls; those under way have ``grace`` seconds, and are cancelled then."""
        await self._server.stop(grace)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Until it has stopped, or for so many seconds."""
        return await self._server.wait_for_termination(timeout)


async def serve_grpc(
    gateway: Gateway,
    address: str,
    *,
    credentials: grpc.ServerCredentials | None = None,
    max_bytes: int,
    authorise: Authorise,
    max_calls: int = 1024,
    idle_seconds: float = 60.0,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> GrpcServer:
    """Listen for gRPC clients, on the running loop.

    Args:
        gateway: who answers.
        address: ``host:port``; port 0 lets the kernel choose.
        credentials: of TLS; none without.
        max_bytes: of one message.
        authorise: called with a call's metadata and the right it needs ("open", "use", "admin"); raises
            UnauthorizedError or ForbiddenError.
        max_calls: at once; what comes beyond is refused with RESOURCE_EXHAUSTED.
        idle_seconds: in which a call's message has to come, and on a stream the next one.
        interceptors: around every call.

    Raises:
        PortInUseError: somebody else listens there, or the address is not this machine's.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # or two servers would share a port unnoticed
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
            # A peer that is gone without a word is found out, and nobody keeps a connection for nothing.
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _HANDSHAKE_MS),
            ("grpc.max_connection_idle_ms", _IDLE_MS),
        ],
        interceptors=interceptors,
        maximum_concurrent_rpcs=max_calls,
    )
    calls = Calls(gateway)
    handlers = {name: _handler(name, getattr(calls, name), authorise, idle_seconds) for name in CALLS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers), _Others()))
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as wrong:
        await server.stop(0)
        raise PortInUseError(f"gRPC cannot listen on {address}: {wrong}") from None
    await server.start()
    return GrpcServer(port, server)


def _handler(name: str, call: Callable[..., Any], authorise: Authorise, seconds: float) -> grpc.RpcMethodHandler:
    method, right = SERVICE.methods_by_name[name], CALLS[name]
    take = functools.partial(_take, message(method.input_type.name), seconds)
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(_answer_stream(call, right, authorise, take), None, _bytes_of)
    # What sends one message looks the same on the wire. So it is ours to wait for it, and not for ever; and to parse
    # it, for what cannot be parsed is the client's error and has to be told as such.
    return grpc.stream_unary_rpc_method_handler(_answer(call, right, authorise, take), None, _bytes_of)


def _bytes_of(told: Any) -> bytes:
    return told.SerializeToString()


async def _take(kind: Any, seconds: float, sent: AsyncIterator[bytes]) -> Any:
    """The next message of a call; None after the last."""
    try:
        async with asyncio.timeout(seconds):
            return kind.FromString(await anext(sent))
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise RequestTimeoutError(f"no {kind.DESCRIPTOR.name} came in {seconds:g} seconds") from None
    except DecodeError as wrong:
        raise BadRequestError(f"this is no {kind.DESCRIPTOR.name}: {wrong}") from None


def _answer(
    call: Callable[..., Awaitable[Any]], right: str, authorise: Authorise, take: Callable[..., Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    async def answer(sent: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
        try:
            authorise(_metadata(context), right)
            request = await take(aiter(sent))
            if request is None:
                raise BadRequestError("the call brought no message")
            return await call(request, context)
        except Exception as wrong:
            await _tell(wrong, context)

    return answer


def _answer_stream(
    call: Callable[..., AsyncIterator[Any]], right: str, authorise: Authorise, take: Callable[..., Awaitable[Any]]
) -> Callable[..., AsyncIterator[Any]]:
    async def answer(sent: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            authorise(_metadata(context), right)
            async for told in call(_taken(take, aiter(sent)), context):
                yield told
        except Exception as wrong:
            await _tell(wrong, context)

    return answer


async def _taken(take: Callable[..., Awaitable[Any]], sent: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    while (request := await take(sent)) is not None:
        yield request


def _metadata(context: grpc.aio.ServicerContext) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


async def _tell(wrong: Exception, context: grpc.aio.ServicerContext) -> None:
    if isinstance(wrong, grpc.aio.AbortError):
        raise wrong
    if not isinstance(wrong, RequestError):
        _LOG.exception("a gRPC call failed", exc_info=wrong)
        await context.abort(grpc.StatusCode.INTERNAL, "the gateway failed; its log says why")
        return
    trailing: list[tuple[str, str | bytes]] = [("narrowboat-error", type(wrong).__name__)]
    if wrong.retry_after is not None:
        trailing.append(("retry-after", str(max(1, math.ceil(wrong.retry_after)))))
        trailing.append(("retry-after-ms", str(max(1, math.ceil(wrong.retry_after * 1000)))))
    if wrong.details:
        details = orjson.dumps(wrong.details, default=str)
        if len(details) <= _LONGEST_DETAILS:
            trailing.append(("narrowboat-details-bin", details))
    await context.abort(grpc.StatusCode[wrong.grpc], _shortened(str(wrong)), tuple(trailing))


def _shortened(said: str) -> str:
    """As much of a message as clients take; on the wire, what is not plain ASCII is three bytes for one."""
    said, room = said.encode("utf-8", "replace").decode(), _LONGEST_MESSAGE
    for place, letter in enumerate(said):
        room -= 1 if " " <= letter <= "~" and letter != "%" else 3 * len(letter.encode())
        if room < 0:
            return f"{said[:place]}..."
    return said


class _Others(grpc.GenericRpcHandler):
    """Services and methods of other protocols."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        said = _OTHER.format(method=handler_call_details.method[:200])

        async def refuse(sent: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, said, (("narrowboat-error", "ProtocolVersionError"),))
            yield b""  # never reached; makes this a generator

        return grpc.stream_stream_rpc_method_handler(refuse)
