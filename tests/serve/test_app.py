"""All rooms behind one door."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from narrowboat.serve.app import make_app, make_rooms
from narrowboat.serve.settings import Limits, ServeSettings
from serve_guard_kit import (
    LONG,
    LivingGateway,
    ask,
    exchange,
    make_certificate,
    on_a_loop,
    request,
    serving,
)

USE = "u" * 20


def published() -> dict[str, Any]:
    return make_rooms(LivingGateway(), ServeSettings(Path("tasks.yaml"))).openapi()


def test_every_path_that_is_promised_is_there() -> None:
    paths = published()["paths"]
    assert {
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{model}",
        "/v2/models/{model}/infer",
        "/v2/repository/index",
        "/v2/repository/models/{model}/load",
        "/v2/repository/models/{model}/unload",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/plan",
        "/v1/admission",
        "/v1/budget",
        "/v1/events",
        "/metrics",
    } <= set(paths)


def test_the_published_document_says_who_may_ask_and_what_is_refused() -> None:
    document = published()
    assert document["info"]["title"] == "narrowboat" and document["info"]["version"]
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert document["paths"]["/v2/health/live"]["get"]["security"] == []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if operation["security"]:
                assert operation["security"] == [{}, {"bearer": []}]
                assert {"401", "403", "429", "503"} <= set(operation["responses"]), (method, path)
    spoken = document["paths"]["/v1/models"]["get"]["responses"]["401"]["content"]["application/json"]["schema"]
    assert spoken["$ref"].endswith("/OpenAIError")


def test_every_reference_in_it_leads_somewhere() -> None:
    document = published()

    def look(part: Any) -> None:
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                found: Any = document
                for key in part["$ref"].removeprefix("#/").split("/"):
                    found = found[key]
            for value in part.values():
                look(value)
        elif isinstance(part, list):
            for value in part:
                look(value)

    look(document)


def test_there_is_no_page_that_loads_from_elsewhere() -> None:
    app = make_app(LivingGateway(), ServeSettings(Path("tasks.yaml")))
    assert (app.rooms.docs_url, app.rooms.redoc_url) == (None, None)


def test_rooms_do_not_share_a_path() -> None:
    seen: set[tuple[str, str]] = set()
    for path, operations in published()["paths"].items():
        for method in operations:
            assert (method, path) not in seen
            seen.add((method, path))
    app = make_rooms(LivingGateway(), ServeSettings(Path("tasks.yaml")))
    routes = [(method, route.path) for route in app.routes for method in getattr(route, "methods", None) or ()]
    assert len(routes) == len(set(routes))


def test_all_rooms_answer_over_a_socket() -> None:
    async def main() -> None:
        async with serving(rooms=make_rooms) as served:
            for path in (
                "/",
                "/openapi.json",
                "/v2",
                "/v2/health/live",
                "/v2/models/identity",
                "/v1/plan",
                "/v1/models",
            ):
                assert (await ask(served.port, "GET", path)).status == 200, path
            assert (await ask(served.port, "GET", "/metrics")).status == 200
            tensor = {"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [1.5] * 8}
            body = json.dumps({"inputs": [tensor]}).encode()
            told = await ask(served.port, "POST", "/v2/models/identity/infer", body=body)
            assert told.status == 200 and told.json()["outputs"][0]["data"] == [1.5] * 8
            admission = await ask(
                served.port, "POST", "/v1/admission", {"Content-Type": "application/json"}, b'{"budget": "1GiB"}'
            )
            assert admission.status == 200 and admission.json()["admitted"]

    on_a_loop(main())


def test_limits_reach_the_rooms() -> None:
    async def main() -> None:
        limits = Limits(body_bytes=2000, held_bytes=4000)
        async with serving(rooms=make_rooms, limits=limits) as served:
            for path in (
                "/v2/models/identity/infer",
                "/v1/chat/completions",
                "/v1/admission",
                "/v1/tasks/colours/try",
            ):
                kind = {"Content-Type": "image/png" if path.endswith("try") else "application/json"}
                large = await ask(served.port, "POST", path, kind, b" " * 2001)
                assert large.status == 413, path
                grows = request("POST", path, served.port, {"Transfer-Encoding": "chunked", **kind})
                grows += b"3e8\r\n" + b" " * 1000 + b"\r\n" + b"3e9\r\n" + b" " * 1001 + b"\r\n0\r\n\r\n"
                assert (await exchange(served.port, grows)).status == 413, path

    on_a_loop(main())


@pytest.mark.parametrize("tls", [False, True])
def test_grpc_goes_by_the_same_tokens_and_certificate(
    tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grpc

    from narrowboat.serve.oip.messages import message

    monkeypatch.setenv("NARROWBOAT_TOKEN", USE)
    files = dict(zip(("certificate", "key"), make_certificate(tmp_path), strict=True))

    async def main() -> None:
        async with serving(rooms=make_rooms, grpc_port=0, **(files if tls else {})) as served:
            address = served.server.addresses.grpc
            assert address is not None
            if tls:
                root = grpc.ssl_channel_credentials(files["certificate"].read_bytes())
                channel = grpc.aio.secure_channel(address, root)
            else:
                channel = grpc.aio.insecure_channel(address)
            async with channel:

                async def call(name: str, request: Any, token: str | None = USE) -> Any:
                    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
                    method = channel.unary_unary(
                        f"/inference.GRPCInferenceService/{name}",
                        request_serializer=lambda made: made.SerializeToString(),
                        response_deserializer=message(f"{name}Response").FromString,
                    )
                    return await method(request, metadata=metadata, timeout=LONG)

                assert (await call("ServerLive", message("ServerLiveRequest")(), None)).live
                ready = message("ModelReadyRequest")(name="identity")
                assert (await call("ModelReady", ready)).ready
                load = message("RepositoryModelLoadRequest")(model_name="spare")
                for token, asked, name, code in (
                    (None, ready, "ModelReady", grpc.StatusCode.UNAUTHENTICATED),
                    ("x" * 20, ready, "ModelReady", grpc.StatusCode.UNAUTHENTICATED),
                    (USE, load, "RepositoryModelLoad", grpc.StatusCode.PERMISSION_DENIED),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as error:
                        await call(name, asked, token)
                    assert error.value.code() is code
                assert not served.gateway.changes
                served.server.end()
                assert await asyncio.wait_for(served.ended(), LONG)

    on_a_loop(main())


def test_the_gateways_process_never_imports_torch() -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import narrowboat.serve.gateway;"
        "from serve_guard_kit import LivingGateway; from narrowboat.serve.settings import ServeSettings;"
        "from narrowboat.serve.app import make_rooms; import narrowboat.serve.server, narrowboat.serve.oip.grpc;"
        "make_rooms(LivingGateway(), ServeSettings(pathlib.Path('tasks.yaml'))); sys.exit('torch' in sys.modules)"
    )
    tests = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, tests], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
