"""The calls of ``GRPCInferenceService``, one method each, named as the protocol names them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio

from narrowboat.errors import ExpiredError, NoSuchTaskError, RequestError
from narrowboat.serve.interface import Gateway
from narrowboat.serve.oip import about
from narrowboat.serve.oip.ask import ready, served, sooner
from narrowboat.serve.oip.grpc_infer import FINAL, FINAL_ASKED, read_ask, values, write_answer
from narrowboat.serve.oip.messages import message
from narrowboat.serve.oip.repository import load_fields

# The right that each call needs.
CALLS = {
    "ServerLive": "open",
    "ServerReady": "open",
    "ModelReady": "use",
    "ServerMetadata": "use",
    "ModelMetadata": "use",
    "ModelInfer": "use",
    "ModelStreamInfer": "use",
    "ModelConfig": "use",
    "ModelStatistics": "use",
    "RepositoryIndex": "use",
    "RepositoryModelLoad": "admin",
    "RepositoryModelUnload": "admin",
}
_LIVE, _READY, _MODEL_READY = (message(f"{name}Response") for name in ("ServerLive", "ServerReady", "ModelReady"))
_SERVER, _MODEL = message("ServerMetadataResponse"), message("ModelMetadataResponse")
_CONFIG, _STATISTICS = message("ModelConfigResponse"), message("ModelStatisticsResponse")
_INDEX, _STREAMED = message("RepositoryIndexResponse"), message("ModelStreamInferResponse")
_LOADED, _UNLOADED = message("RepositoryModelLoadResponse"), message("RepositoryModelUnloadResponse")
_LONGEST_DEADLINE = 1e9  # seconds; what is later is none
Context: TypeAlias = grpc.aio.ServicerContext


class Calls:
    """What clients may call. Every method takes a message and the call's context and gives a message.

    Args:
        gateway: who answers.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def ServerLive(self, request: Any, context: Context) -> Any:  # noqa: N802
        """The gateway is up."""
        return _LIVE(live=True)

    async def ServerReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Requests are let in."""
        return _READY(ready=self._gateway.state == "serving")

    async def ModelReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Requests to one task are let in; never to one that is not known."""
        try:
            face = served(self._gateway, request.name, request.version)
        except NoSuchTaskError:
            return _MODEL_READY(ready=False)
        return _MODEL_READY(ready=ready(self._gateway, face))

    async def ServerMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Name, version, extensions."""
        return _SERVER(**about.server())

    async def ModelMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Tensors of a task."""
        told = about.model(served(self._gateway, request.name, request.version))
        del told["parameters"]  # the message has no place for them
        return _MODEL(**told)

    async def ModelConfig(self, request: Any, context: Context) -> Any:  # noqa: N802
        """A task in the words of Triton's model configuration."""
        return _CONFIG(config=about.config(served(self._gateway, request.name, request.version)))

    async def ModelStatistics(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Jobs that were done, of one task or of all."""
        faces = self._gateway.faces()
        if request.name:
            faces = [served(self._gateway, request.name, request.version)]
        return _STATISTICS(model_stats=await about.statistics(self._gateway, faces))

    async def ModelInfer(self, request: Any, context: Context) -> Any:  # noqa: N802
        """One inference. The call's own deadline counts as its ``timeout`` does."""
        return await self._infer(request, context)

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:  # noqa: N802
        """One inference after another; one that is refused is told, and the stream goes on."""
        async for request in requests:
            try:
                answer = await self._infer(request, context)
            except RequestError as wrong:
                yield _STREAMED(error_message=str(wrong), infer_response={"id": request.id})
                continue
            # Each of our answers is its request's last.
            if FINAL_ASKED in request.parameters and request.parameters[FINAL_ASKED].bool_param:
                answer.parameters[FINAL].bool_param = True
            yield _STREAMED(infer_response=answer)

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:  # noqa: N802
        """All tasks that run or could be loaded."""
        return _INDEX(models=about.index(self._gateway, request.ready))

    async def RepositoryModelLoad(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Ask for admission of a task."""
        await self._gateway.load(request.model_name, load_fields(request.model_name, values(request.parameters)))
        return _LOADED()

    async def RepositoryModelUnload(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Go on without a task."""
        await self._gateway.unload(request.model_name)
        return _UNLOADED()

    async def _infer(self, request: Any, context: Context) -> Any:
        face = served(self._gateway, request.model_name, request.model_version)
        ask = read_ask(face, request)
        timeout = sooner(ask.timeout, _left(context))
        reply = await self._gateway.infer(face.name, ask.inputs, timeout=timeout, priority=ask.priority)
        return write_answer(face, ask, reply)


def _left(context: Context) -> int | None:
    seconds = context.time_remaining()
    if seconds is None or seconds > _LONGEST_DEADLINE:
        return None
    if seconds <= 0:
        raise ExpiredError("the call's deadline has passed")
    return max(1, int(seconds * 1e6))
