"""The Open Inference Protocol's rooms on real sockets of loopback, before a fake gateway."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from narrowboat.errors import RequestError
from narrowboat.serve.interface import Gateway
from narrowboat.serve.oip.grpc import serve_grpc
from narrowboat.serve.oip.routes import router
from serve_kit import FakeGateway

LIMIT = 1 << 20  # of a body and a message


def make_app(gateway: Gateway, max_bytes: int = LIMIT) -> FastAPI:
    """The room's routes alone, with errors as the server tells them."""
    app = FastAPI()
    app.include_router(router(gateway, max_bytes=max_bytes))

    @app.exception_handler(RequestError)
    async def told(request: Request, wrong: RequestError) -> Response:
        headers = {} if wrong.retry_after is None else {"Retry-After": str(max(1, round(wrong.retry_after)))}
        body = {"error": str(wrong), "type": type(wrong).__name__, **wrong.details}
        return JSONResponse(body, wrong.status, headers)

    return app


def allow(metadata: Mapping[str, str], right: str) -> None:
    """Everybody may do everything."""


def wait_until(holds: Callable[[], Any], seconds: float = 10) -> None:
    """Until it does, or fail."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


class Stand:
    """Stands where a gateway does, so that a test can put its own behind servers that run."""

    def __init__(self, gateway: FakeGateway) -> None:
        self.gateway = gateway

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gateway, name)


@dataclass
class Served:
    """Both servers, on one loop in a thread of its own."""

    stand: Stand
    http: str
    grpc: str

    @property
    def gateway(self) -> FakeGateway:
        """Behind both."""
        return self.stand.gateway

    def anew(self) -> Served:
        """With a fresh gateway."""
        self.stand.gateway = FakeGateway()
        return self


@contextmanager
def serving(gateway: FakeGateway, **grpc_options: Any) -> Iterator[Served]:
    """Serve until the block ends; ports by the kernel."""
    started, failed, stand = threading.Event(), [], Stand(gateway)
    told: dict[str, Any] = {}

    async def main() -> None:
        stop = asyncio.Event()
        config = uvicorn.Config(make_app(stand), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        grpc_server = await serve_grpc(
            stand, "127.0.0.1:0", **{"max_bytes": LIMIT, "authorise": allow, **grpc_options}
        )
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        told.update(
            loop=asyncio.get_running_loop(), stop=stop, http=f"127.0.0.1:{port}", grpc=f"127.0.0.1:{grpc_server.port}"
        )
        started.set()
        await stop.wait()
        server.should_exit = True
        await running
        await grpc_server.stop(0)

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as wrong:  # told in the test's thread
            failed.append(wrong)
        finally:
            started.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(20)
    if failed:
        raise failed[0]
    try:
        yield Served(stand, told["http"], told["grpc"])
    finally:
        told["loop"].call_soon_threadsafe(told["stop"].set)
        thread.join(20)
        if failed:
            raise failed[0]
