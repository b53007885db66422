"""Around every call of gRPC, as ``observe`` is around HTTP's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from narrowboat.serve.watch.watch import Watch

# The HTTP status that says the same, for one label over all protocols.
STATUS = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


class ObserveGrpc(grpc.aio.ServerInterceptor):
    """An interceptor for ``serve_grpc(..., interceptors=[ObserveGrpc(gateway.watch)])``.

    Args:
        watch: is told.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Put the watch around calls of one answer, however their request is read; streams pass."""
        handler = await continuation(details)
        if handler is None or handler.response_streaming:
            return handler
        inner, watch = handler.stream_unary or handler.unary_unary, self._watch
        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )

        async def watched(request: Any, context: Any) -> Any:
            told = context.invocation_metadata() or ()
            headers = {str(key): str(value) for key, value in told if str(key).startswith("trace")}
            with watch.request("grpc", headers) as seen:
                try:
                    return await inner(request, context)
                finally:
                    code = context.code()
                    if code is not None and not seen.code:
                        known = code if isinstance(code, grpc.StatusCode) else _by_number(code)
                        seen.code = STATUS.get(known, 500)

        return make(
            watched,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _by_number(number: int) -> grpc.StatusCode:
    return next((code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN)
