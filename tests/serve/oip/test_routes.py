"""The protocol over HTTP, as stock clients speak it and as nobody should."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from narrowboat import __version__
from narrowboat.errors import (
    BeyondContractError,
    ConflictError,
    ExpiredError,
    JobFailedError,
    NotServingError,
    ProtocolVersionError,
)
from narrowboat.tasks.tensors import SIZES
from serve_kit import NUMPY, FakeGateway, tick
from serve_oip_kit import LIMIT, Served, make_app, serving

X = np.arange(8, dtype=np.float32).reshape(1, 8) / 3
JSON = {"inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32", "data": X[0].tolist()}]}


@pytest.fixture(scope="module")
def servers() -> Iterator[Served]:
    with serving(FakeGateway()) as it:
        yield it


@pytest.fixture
def served(servers: Served) -> Served:
    return servers.anew()


# The client's __del__ closes it once more, which gevent does not bear in the server's thread, where garbage may be
# collected as well: so no client is garbage before the end.
_KEPT: list[triton.InferenceServerClient] = []


@pytest.fixture
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.http) as it:
        _KEPT.append(it)
        yield it


def tensor(name: str, array: np.ndarray, datatype: str, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    return made.set_data_from_numpy(array, binary_data=binary)


def post(served: Served, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    connection = HTTPConnection(served.http, timeout=10)
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body)
    connection.request("POST", path, sent, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    return answer.status, told, dict(answer.getheaders())


# -- what a stock client calls --------------------------------------------------------------------------


def test_health_and_metadata(served: Served, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    about = client.get_server_metadata()
    assert (about["name"], about["version"]) == ("narrowboat", __version__)
    assert {"binary_tensor_data", "model_repository"} <= set(about["extensions"])
    model = client.get_model_metadata("identity", "1")
    assert model["versions"] == ["1"]
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [1, 8]}]
    assert model["parameters"]["bound_us"] == 8_000
    assert client.get_model_config("identity")["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [1, 8]}]
    served.gateway.state = "draining"
    assert client.is_server_live() and not client.is_server_ready()


def test_ready_is_what_takes_requests_now(served: Served, client: triton.InferenceServerClient) -> None:
    ready = {name: client.is_model_ready(name) for name in ("identity", "spare", "camera", "nobody")}
    assert ready == {"identity": True, "spare": False, "camera": False, "nobody": False}
    assert client.is_model_ready("identity", "1") and not client.is_model_ready("identity", "2")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_infer(client: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None) -> None:
    outputs = None if binary_out is None else [triton.InferRequestedOutput("y", binary_data=binary_out)]
    answer = client.infer("identity", [tensor("x", X, "FP32", binary_in)], outputs=outputs, request_id="me")
    assert np.array_equal(answer.as_numpy("y"), X)
    told = answer.get_response()
    assert (told["id"], told["model_name"], told["model_version"]) == ("me", "identity", "1")
    assert told["parameters"] == {
        "admitted": True,
        "bound_us": 8_000,
        "deadline_us": 20_000,
        "response_us": 1_234,
        "met": True,
    }


def test_all_datatypes(client: triton.InferenceServerClient) -> None:
    given = {}
    for name in SIZES:
        array = np.array([[0, 1, 2], [3, 4, 100]], NUMPY.get(name, np.dtype("<f4")))
        given[name] = array if name != "BOOL" else array.astype(bool)
    inputs = [tensor(f"in_{name.lower()}", array, name) for name, array in given.items()]
    for binary in (True, False):
        outputs = [triton.InferRequestedOutput(f"out_{name.lower()}", binary_data=binary) for name in SIZES]
        answer = client.infer("types", inputs, outputs=outputs)
        for name, array in given.items():
            assert np.array_equal(answer.as_numpy(f"out_{name.lower()}"), array), name


def test_some_of_the_outputs(client: triton.InferenceServerClient) -> None:
    ones = np.ones((1, 16), np.int32)
    inputs = [tensor("INPUT0", ones, "INT32"), tensor("INPUT1", ones * 3, "INT32", binary=False)]
    answer = client.infer("simple", inputs, outputs=[triton.InferRequestedOutput("OUTPUT1")])
    assert np.array_equal(answer.as_numpy("OUTPUT1"), ones * -2)
    assert answer.as_numpy("OUTPUT0") is None


def test_timeout_and_priority_reach_the_gateway(served: Served, client: triton.InferenceServerClient) -> None:
    client.infer("identity", [tensor("x", X, "FP32")], timeout=7_000, priority=3)
    client.infer("identity", [tensor("x", X, "FP32")], headers={"x-slo-ttft-ms": "4"})
    assert [(asked.timeout, asked.priority) for asked in served.gateway.asked] == [(7_000, 3), (4_000, 0)]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: triton.InferenceServerClient, algorithm: str) -> None:
    answer = client.infer(
        "identity",
        [tensor("x", X, "FP32")],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert np.array_equal(answer.as_numpy("y"), X)


def test_several_at_once(served: Served) -> None:
    with triton.InferenceServerClient(served.http, concurrency=4) as many:
        _KEPT.append(many)
        waiting = [many.async_infer("identity", [tensor("x", X + k, "FP32")]) for k in range(20)]
        for k, answer in enumerate(waiting):
            assert np.array_equal(answer.get_result().as_numpy("y"), X + k)


def test_repository(served: Served, client: triton.InferenceServerClient) -> None:
    index = {model["name"]: model for model in client.get_model_repository_index()}
    assert index["spare"] == {"name": "spare", "version": "1", "state": "UNAVAILABLE", "reason": "not loaded"}
    client.load_model("spare")
    assert client.is_model_ready("spare")
    client.load_model("spare", config=json.dumps({"period": "1s"}))
    client.unload_model("spare")
    assert not client.is_model_ready("spare")
    assert served.gateway.changes == [
        ("load", ("spare", None)),
        ("load", ("spare", {"period": "1s"})),
        ("unload", "spare"),
    ]


def test_statistics(served: Served, client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no statistics yet"):
        client.get_inference_statistics("identity")
    served.gateway.push(tick(served.gateway, 40))
    (told,) = client.get_inference_statistics("identity")["model_stats"]
    assert told == {"name": "identity", "version": "1", "inference_count": 8, "execution_count": 8}
    assert len(client.get_inference_statistics()["model_stats"]) == 5
    assert not served.gateway.feeds


@pytest.mark.parametrize(
    "call",
    ["get_trace_settings", "get_log_settings", "get_system_shared_memory_status", "get_cuda_shared_memory_status"],
)
def test_extensions_that_are_not_spoken_are_told(client: triton.InferenceServerClient, call: str) -> None:
    with pytest.raises(InferenceServerException, match="is not supported; GET /v2 lists") as refused:
        getattr(client, call)()
    assert refused.value.status() == "404"


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        (BeyondContractError("too soon", retry_after=0.3), "429"),
        (ExpiredError("too late"), "504"),
        (NotServingError("restarting", retry_after=2), "503"),
        (JobFailedError("division by zero"), "500"),
    ],
)
def test_errors(served: Served, client: triton.InferenceServerClient, wrong: Exception, status: str) -> None:
    served.gateway.fail("identity", wrong)
    with pytest.raises(InferenceServerException) as refused:
        client.infer("identity", [tensor("x", X, "FP32")])
    assert (refused.value.status(), refused.value.message()) == (status, str(wrong))
    assert np.array_equal(client.infer("identity", [tensor("x", X, "FP32")]).as_numpy("y"), X)


@pytest.mark.parametrize(
    ("name", "version", "status", "said"),
    [
        ("nobody", "", "404", "there is no task 'nobody'"),
        ("identity", "2", "404", "has no version '2'; there is 1 only"),
        ("../identity", "", "404", "."),
        ("spare", "", "503", "not loaded"),
        ("camera", "", "400", "takes its inputs itself"),
    ],
)
def test_names_that_cannot_be_asked(client: triton.InferenceServerClient, name, version, status, said) -> None:
    with pytest.raises(InferenceServerException, match=said) as refused:
        client.infer(name, [tensor("x", X, "FP32")], model_version=version)
    assert refused.value.status() == status


def test_the_asynchronous_client(served: Served) -> None:
    async def go() -> None:
        async with triton_aio.InferenceServerClient(served.http) as client:
            assert await client.is_server_live() and await client.is_server_ready()
            assert await client.is_model_ready("identity")
            assert (await client.get_model_metadata("identity"))["name"] == "identity"
            answer = await client.infer("identity", [tensor("x", X, "FP32")], timeout=9_000)
            assert np.array_equal(answer.as_numpy("y"), X)
            await client.load_model("spare")
            assert len(await client.get_model_repository_index()) == 6
            with pytest.raises(InferenceServerException, match="no task"):
                await client.infer("nobody", [tensor("x", X, "FP32")])

    asyncio.run(go())
    assert served.gateway.asked[0].timeout == 9_000


# -- what stock clients do not show ---------------------------------------------------------------------


def test_a_refused_load_is_a_conflict_with_its_explanation(served: Served) -> None:
    served.gateway.refuse(ConflictError("it does not fit", details={"reasons": ["it is large"]}))
    status, told, _ = post(served, "/v2/repository/models/spare/load")
    assert status == 409
    assert (told["type"], told["reasons"]) == ("ConflictError", ["it is large"])
    status, told, _ = post(served, "/v2/repository/models/spare/load", {})
    assert (status, told["admitted"]) == (200, True)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"config": "{"}, "config is no JSON"),
        ({"config": "[]"}, "config has to be a JSON object"),
        ({"config": {"period": 1}}, "config has to be JSON text"),
        ({"config": '{"name": "other"}'}, "names another task"),
        ({"config": "{}", "file:1/model.pt": "AAAA"}, "cannot bring files"),
        ({"dir": "/etc"}, "load takes the parameter config"),
        (["config"], "parameters has to be an object"),
    ],
)
def test_a_load_brings_nothing_but_fields(served: Served, parameters: Any, said: str) -> None:
    status, told, _ = post(served, "/v2/repository/models/spare/load", {"parameters": parameters})
    assert (status, told["type"]) == (400, "BadRequestError")
    assert said in told["error"]
    assert not served.gateway.changes


def test_only_those_that_are_ready_are_listed_if_asked_so(served: Served) -> None:
    connection = HTTPConnection(served.http)
    connection.request("POST", "/v2/repository/index", '{"ready": true}')
    names = [model["name"] for model in json.loads(connection.getresponse().read())]
    assert "spare" not in names and len(names) == 5
    assert post(served, "/v2/repository/index", {"ready": "yes"})[0] == 400
    assert post(served, "/v2/repository/index", [])[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "protocol"),
    [
        ("POST", "/v1/models/identity:predict", "KServe"),
        ("POST", "/v1/models/identity:explain", "KServe"),
        ("POST", "/v1/models/identity/versions/1:predict", "TensorFlow Serving"),
        ("POST", "/v1/models/identity:classify", "TensorFlow Serving"),
        ("GET", "/v1/models/identity/metadata", "TensorFlow Serving"),
        ("POST", "/predictions/identity", "TorchServe"),
        ("POST", "/predictions/identity/1.0", "TorchServe"),
        ("POST", "/predict", "LitServe"),
        ("POST", "/invocations", "MLflow"),
        ("POST", "/api/infer/identity/1", "Triton's v1"),
        ("GET", "/api/status/identity", "Triton's v1"),
    ],
)
def test_clients_of_other_protocols_are_told_in_one_line(
    served: Served, method: str, path: str, protocol: str
) -> None:
    connection = HTTPConnection(served.http)
    connection.request(method, path, "{}" if method == "POST" else None)
    answer = connection.getresponse()
    told = json.loads(answer.read())
    assert (answer.status, told["type"]) == (400, ProtocolVersionError.__name__)
    assert protocol in told["error"] and "/v2/models/{name}/infer" in told["error"] and "\n" not in told["error"]


def test_a_body_beyond_the_limit_is_refused_compressed_or_not(served: Served) -> None:
    path = "/v2/models/identity/infer"
    assert post(served, path, b" " * (LIMIT + 1))[0] == 413
    bomb = b" " * (1 << 26)
    for name, sent in (("gzip", gzip.compress(bomb)), ("deflate", zlib.compress(bomb))):
        status, told, _ = post(served, path, sent, **{"Content-Encoding": name})
        assert (status, told["type"], told["limit"]) == (413, "TooLargeError", LIMIT)


@pytest.mark.parametrize(
    ("encoding", "sent", "said"),
    [
        ("br", b"x", "not supported"),
        ("gzip, gzip", b"x", "not supported"),
        ("gzip", b"no gzip", "not compressed as it says"),
        ("gzip", gzip.compress(b"{}" * 100)[:-9], "ends too soon"),
        ("deflate", zlib.compress(b"{}") + b"more", "something follows"),
    ],
)
def test_a_body_that_is_not_compressed_as_it_says(served: Served, encoding: str, sent: bytes, said: str) -> None:
    status, told, _ = post(served, "/v2/models/identity/infer", sent, **{"Content-Encoding": encoding})
    assert status == 400
    assert said in told["error"]


def test_a_body_that_says_nothing_of_its_length_is_read(served: Served) -> None:
    connection = HTTPConnection(served.http)
    text = json.dumps(JSON).encode()
    chunks = iter([text[:50], text[50:90], text[90:]])
    connection.request(
        "POST", "/v2/models/identity/infer", chunks, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
    )
    answer = connection.getresponse()
    assert answer.status == 200
    assert np.allclose(json.loads(answer.read())["outputs"][0]["data"], X[0])


def test_all_routes_are_in_openapi() -> None:
    told = make_app(FakeGateway()).openapi()["paths"]
    assert "post" in told["/v2/models/{model}/versions/{version}/infer"]
    infer = told["/v2/models/{model}/infer"]["post"]
    assert "application/json" in infer["requestBody"]["content"]
    assert {"200", "400", "404", "413", "429", "503", "504"} <= set(infer["responses"])
    ids = [route["operationId"] for path in told.values() for route in path.values()]
    assert len(set(ids)) == len(ids) == 17
