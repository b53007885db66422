"""Clients of other and older protocols are told which one is spoken here, in one line."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from narrowboat.errors import NoSuchTaskError, ProtocolVersionError, RequestError

_HERE = "narrowboat speaks the Open Inference Protocol v2: POST /v2/models/{name}/infer"
_OLDER = (
    (r"/v1/models/{rest:path}:predict", "KServe's or TensorFlow Serving's v1 protocol"),
    (r"/v1/models/{rest:path}:explain", "KServe's v1 protocol"),
    (r"/v1/models/{rest:path}:classify", "TensorFlow Serving's protocol"),
    (r"/v1/models/{rest:path}:regress", "TensorFlow Serving's protocol"),
    (r"/v1/models/{name}/metadata", "TensorFlow Serving's protocol"),
    (r"/predictions/{rest:path}", "TorchServe's protocol"),
    (r"/explanations/{rest:path}", "TorchServe's protocol"),
    (r"/predict", "LitServe's protocol"),
    (r"/invocations", "SageMaker's or MLflow's protocol"),
    (r"/api/infer/{rest:path}", "Triton's v1 protocol"),
    (r"/api/status/{rest:path}", "Triton's v1 protocol"),
    (r"/api/health/{rest:path}", "Triton's v1 protocol"),
)
# Extensions of Triton's that its stock clients have calls for.
_EXTENSIONS = (
    (r"/v2/systemsharedmemory/{rest:path}", "system shared memory"),
    (r"/v2/cudasharedmemory/{rest:path}", "CUDA shared memory"),
    (r"/v2/trace/setting", "trace settings"),
    (r"/v2/models/{name}/trace/setting", "trace settings"),
    (r"/v2/logging", "log settings"),
    (r"/v2/models/{name}/generate", "generate"),
    (r"/v2/models/{name}/generate_stream", "generate"),
)


def add_older(router: APIRouter) -> None:
    """Routes that end in ProtocolVersionError, and in NoSuchTaskError for extensions that are not spoken."""
    for path, protocol in _OLDER:
        router.add_route(path, _refusing(ProtocolVersionError(f"this is {protocol}; {_HERE}")), ["GET", "POST"])
    for path, extension in _EXTENSIONS:
        wrong = NoSuchTaskError(f"Triton's extension for {extension} is not supported; GET /v2 lists those that are")
        router.add_route(path, _refusing(wrong), ["GET", "POST"])


def _refusing(wrong: RequestError) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(request: Request) -> Response:
        raise type(wrong)(str(wrong))

    return refuse
