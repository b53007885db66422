"""The protocol over gRPC, as stock clients speak it and as nobody should."""

from __future__ import annotations

import asyncio
import json
import math
import queue
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from tritonclient.utils import InferenceServerException

from narrowboat.errors import (
    BeyondContractError,
    ConflictError,
    ExpiredError,
    ForbiddenError,
    JobFailedError,
    NotServingError,
    PortInUseError,
    UnauthorizedError,
)
from narrowboat.serve.oip.grpc import serve_grpc
from narrowboat.tasks.tensors import SIZES
from serve_guard_kit import make_certificate
from serve_kit import NUMPY, FakeGateway, tick
from serve_oip_kit import LIMIT, Served, allow, serving, wait_until

X = np.arange(8, dtype=np.float32).reshape(1, 8) / 3
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def servers() -> Iterator[Served]:
    with serving(FakeGateway()) as it:
        yield it


@pytest.fixture
def served(servers: Served) -> Served:
    return servers.anew()


@pytest.fixture
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.grpc) as it:
        yield it


@pytest.fixture
def stub(served: Served) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(served.grpc) as channel:
        yield GRPCInferenceServiceStub(channel)


def tensor(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    return triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


def asking(*tensors: dict[str, Any], name: str = "identity", **fields: Any) -> service_pb2.ModelInferRequest:
    return service_pb2.ModelInferRequest(model_name=name, inputs=tensors, **fields)


RAW = {"name": "x", "datatype": "FP32", "shape": [1, 8]}

# -- what a stock client calls --------------------------------------------------------------------------


def test_health_and_metadata(served: Served, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata().name == "narrowboat"
    model = client.get_model_metadata("identity", "1", as_json=True)
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["1", "8"]}]
    config = client.get_model_config("identity").config
    assert [(each.name, list(each.dims)) for each in config.input] == [("x", [1, 8])]
    assert config.input[0].data_type == 11 and config.version_policy.latest.num_versions == 1
    ready = {name: client.is_model_ready(name) for name in ("identity", "spare", "camera", "nobody")}
    assert ready == {"identity": True, "spare": False, "camera": False, "nobody": False}
    served.gateway.state = "draining"
    assert client.is_server_live() and not client.is_server_ready()


def test_infer(client: triton.InferenceServerClient, served: Served) -> None:
    answer = client.infer("identity", [tensor("x", X, "FP32")], request_id="me", timeout=7_000, priority=3)
    assert np.array_equal(answer.as_numpy("y"), X)
    told = answer.get_response()
    assert (told.id, told.model_name, told.model_version) == ("me", "identity", "1")
    assert told.parameters["admitted"].bool_param and told.parameters["met"].bool_param
    assert told.parameters["bound_us"].int64_param == 8_000
    assert told.parameters["deadline_us"].int64_param == 7_000
    assert told.parameters["response_us"].int64_param == 1_234
    assert (served.gateway.asked[0].timeout, served.gateway.asked[0].priority) == (7_000, 3)


def test_all_datatypes_raw(client: triton.InferenceServerClient) -> None:
    given = {}
    for name in SIZES:
        array = np.array([[0, 1, 2], [3, 4, 100]], NUMPY.get(name, np.dtype("<f4")))
        given[name] = array if name != "BOOL" else array.astype(bool)
    answer = client.infer("types", [tensor(f"in_{name.lower()}", array, name) for name, array in given.items()])
    for name, array in given.items():
        assert np.array_equal(answer.as_numpy(f"out_{name.lower()}"), array), name


def test_some_of_the_outputs(client: triton.InferenceServerClient) -> None:
    ones = np.ones((1, 16), np.int32)
    inputs = [tensor("INPUT1", ones * 3, "INT32"), tensor("INPUT0", ones, "INT32")]
    answer = client.infer("simple", inputs, outputs=[triton.InferRequestedOutput("OUTPUT1")])
    assert np.array_equal(answer.as_numpy("OUTPUT1"), ones * -2)
    assert answer.as_numpy("OUTPUT0") is None


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: triton.InferenceServerClient, algorithm: str) -> None:
    answer = client.infer("identity", [tensor("x", X, "FP32")], compression_algorithm=algorithm)
    assert np.array_equal(answer.as_numpy("y"), X)


def test_callbacks_and_cancelling(served: Served, client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.async_infer("identity", [tensor("x", X, "FP32")], lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=10)
    assert error is None and np.array_equal(result.as_numpy("y"), X)
    served.gateway.delay("identity", math.inf)
    call = client.async_infer("identity", [tensor("x", X, "FP32")], lambda result, error: answers.put((result, error)))
    wait_until(lambda: served.gateway.running)
    call.cancel()
    assert answers.get(timeout=10)[1].status() == "StatusCode.CANCELLED"
    wait_until(lambda: served.gateway.cancelled == 1)
    assert not served.gateway.running


def test_stream(served: Served, client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    served.gateway.fail("identity", BeyondContractError("too soon", retry_after=1))
    client.start_stream(lambda result, error: answers.put((result, error)))
    for k in range(3):
        client.async_stream_infer("identity", [tensor("x", X + k, "FP32")], request_id=str(k))
    client.async_stream_infer("identity", [tensor("x", X, "FP32")], enable_empty_final_response=True)
    found = [answers.get(timeout=10) for _ in range(4)]
    client.stop_stream()
    assert found[0][1].message() == "too soon"
    for k in (1, 2):
        assert found[k][0].get_response().id == str(k)
        assert np.array_equal(found[k][0].as_numpy("y"), X + k)
    final = [each[0].get_response().parameters for each in found[1:]]
    assert [told["triton_final_response"].bool_param for told in final] == [False, False, True]


def test_repository(served: Served, client: triton.InferenceServerClient) -> None:
    index = {model.name: model for model in client.get_model_repository_index().models}
    assert (index["spare"].state, index["spare"].reason) == ("UNAVAILABLE", "not loaded")
    assert (index["identity"].state, index["identity"].version) == ("READY", "1")
    client.load_model("spare", config=json.dumps({"period": "1s"}))
    assert client.is_model_ready("spare")
    client.unload_model("spare")
    assert served.gateway.changes == [("load", ("spare", {"period": "1s"})), ("unload", "spare")]
    with pytest.raises(InferenceServerException, match="cannot bring files"):
        client.load_model("spare", config="{}", files={"file:1/model.pt": b"x"})
    served.gateway.refuse(ConflictError("it does not fit", details={"reasons": ["it is large"]}))
    with pytest.raises(InferenceServerException, match="it does not fit") as refused:
        client.load_model("spare")
    assert refused.value.status() == "StatusCode.FAILED_PRECONDITION"


def test_statistics(served: Served, client: triton.InferenceServerClient) -> None:
    served.gateway.push(tick(served.gateway, 40))
    (told,) = client.get_inference_statistics("identity").model_stats
    assert (told.name, told.inference_count) == ("identity", 8)
    assert len(client.get_inference_statistics().model_stats) == 5


@pytest.mark.parametrize(
    "call",
    ["get_trace_settings", "get_log_settings", "get_system_shared_memory_status", "get_cuda_shared_memory_status"],
)
def test_extensions_that_are_not_spoken_are_told(client: triton.InferenceServerClient, call: str) -> None:
    with pytest.raises(InferenceServerException, match=r"inference\.GRPCInferenceService") as refused:
        getattr(client, call)()
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (ExpiredError("too late"), "DEADLINE_EXCEEDED"),
        (NotServingError("restarting"), "UNAVAILABLE"),
        (JobFailedError("division by zero"), "INTERNAL"),
        (BeyondContractError("too soon"), "RESOURCE_EXHAUSTED"),
    ],
)
def test_errors(served: Served, client: triton.InferenceServerClient, wrong: Exception, code: str) -> None:
    served.gateway.fail("identity", wrong)
    with pytest.raises(InferenceServerException) as refused:
        client.infer("identity", [tensor("x", X, "FP32")])
    assert (refused.value.status(), refused.value.message()) == (f"StatusCode.{code}", str(wrong))


def test_the_calls_deadline_is_a_timeout_and_the_sooner_counts(
    served: Served, client: triton.InferenceServerClient
) -> None:
    client.infer("identity", [tensor("x", X, "FP32")], client_timeout=5)
    client.infer("identity", [tensor("x", X, "FP32")], client_timeout=5, timeout=7_000)
    client.infer("identity", [tensor("x", X, "FP32")], client_timeout=5, timeout=60_000_000)
    first, second, third = (asked.timeout for asked in served.gateway.asked)
    # On the wire a deadline is rounded up, by a percent or so.
    assert 4_000_000 < first <= 5_100_000 and second == 7_000 and 4_000_000 < third <= 5_100_000


def test_a_call_that_is_too_late_is_cancelled_here(served: Served, client: triton.InferenceServerClient) -> None:
    served.gateway.delay("identity", math.inf)
    with pytest.raises(InferenceServerException) as refused:
        client.infer("identity", [tensor("x", X, "FP32")], client_timeout=0.2)
    assert refused.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    wait_until(lambda: served.gateway.cancelled == 1)


def test_the_asynchronous_client(served: Served) -> None:
    async def go() -> None:
        async with triton_aio.InferenceServerClient(served.grpc) as client:
            assert await client.is_server_live() and await client.is_server_ready()
            assert await client.is_model_ready("identity")
            answer = await client.infer("identity", [tensor("x", X, "FP32")])
            assert np.array_equal(answer.as_numpy("y"), X)

            async def requests():
                for k in range(3):
                    yield {"model_name": "identity", "inputs": [tensor("x", X + k, "FP32")]}

            found = [answer async for answer, error in client.stream_infer(requests()) if error is None]
            assert [float(answer.as_numpy("y")[0, 0]) for answer in found] == [0, 1, 2]
            with pytest.raises(InferenceServerException, match="no task"):
                await client.infer("nobody", [tensor("x", X, "FP32")])

    asyncio.run(go())


# -- what stock clients do not show ---------------------------------------------------------------------


def test_typed_contents(stub: GRPCInferenceServiceStub) -> None:
    answer = stub.ModelInfer(asking({**RAW, "contents": {"fp32_contents": X[0].tolist()}}))
    assert answer.raw_output_contents[0] == X.tobytes()
    ints = {"datatype": "INT32", "shape": [1, 16], "contents": {"int_contents": range(-8, 8)}}
    answer = stub.ModelInfer(asking({"name": "INPUT0", **ints}, {"name": "INPUT1", **ints}, name="simple"))
    assert np.frombuffer(answer.raw_output_contents[0], "<i4").tolist() == [2 * k for k in range(-8, 8)]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (asking(RAW, raw_input_contents=[bytes(31)]), "31 bytes, but FP32"),
        (asking(RAW, raw_input_contents=[bytes(32)] * 2), "2 entries, but there are 1 inputs"),
        (asking(RAW), "0 elements"),
        (asking({**RAW, "contents": {"fp32_contents": [1.0] * 7}}), "7 elements"),
        (asking({**RAW, "contents": {"fp64_contents": [1.0] * 8}}), "not in fp64_contents"),
        (asking({**RAW, "contents": {"fp32_contents": [1.0]}}, raw_input_contents=[bytes(32)]), "exclude each other"),
        (asking({**RAW, "shape": [1, -8]}, raw_input_contents=[bytes(32)]), "shape is"),
        (asking({**RAW, "shape": [1 << 62, 4]}, raw_input_contents=[bytes(32)]), "shape is"),
        (asking({**RAW, "datatype": "FP33"}, raw_input_contents=[bytes(32)]), "unknown datatype"),
        (asking({**RAW, "name": "z"}, raw_input_contents=[bytes(32)]), "has no input 'z'"),
        (asking(RAW, RAW, raw_input_contents=[bytes(32)] * 2), "given twice"),
        (asking(), "input x is missing"),
        (asking(RAW, raw_input_contents=[bytes(32)], outputs=[{"name": "z"}]), "has no output 'z'"),
        (asking(RAW, raw_input_contents=[bytes(32)], outputs=[{"name": "y"}] * 2), "asked for twice"),
        (asking(RAW, raw_input_contents=[bytes(32)], parameters={"timeout": {"int64_param": -1}}), "whole number"),
        (asking(RAW, raw_input_contents=[bytes(32)], parameters={"timeout": {"double_param": 1}}), "whole number"),
        (asking(RAW, raw_input_contents=[bytes(32)], parameters={"priority": {}}), "whole number"),
        (asking(RAW, raw_input_contents=[bytes(32)], parameters={"sequence_id": {"int64_param": 1}}), "no state"),
        (
            asking({**RAW, "parameters": {"shared_memory_region": {"string_param": "a"}}}),
            "shared_memory_region is not supported",
        ),
        (asking({"name": "in_fp16", "datatype": "FP16", "shape": [2, 3]}, name="types"), "raw_input_contents only"),
        (
            asking(
                {"name": "in_uint8", "datatype": "UINT8", "shape": [2, 3], "contents": {"uint_contents": [300] * 6}},
                name="types",
            ),
            "element 0 is 300, which UINT8 cannot hold",
        ),
    ],
)
def test_a_request_that_is_wrong_is_refused(stub: GRPCInferenceServiceStub, request_: Any, said: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(request_, timeout=10)
    assert refused.value.code() is Code.INVALID_ARGUMENT
    assert said in refused.value.details()


def test_refusals_say_when_to_come_again_and_carry_details(served: Served, stub: GRPCInferenceServiceStub) -> None:
    served.gateway.fail("identity", BeyondContractError("too soon", retry_after=1.234, details={"tokens": 0}))
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(asking(RAW, raw_input_contents=[bytes(32)]))
    trailing = dict(refused.value.trailing_metadata())
    assert (trailing["retry-after"], trailing["retry-after-ms"]) == ("2", "1234")
    assert trailing["narrowboat-error"] == "BeyondContractError"
    assert json.loads(trailing["narrowboat-details-bin"]) == {"tokens": 0}


@pytest.mark.parametrize(("letter", "kept"), [("x", 2000), ("µ", 333), ("%", 666), ("\ud800", 2000)])
def test_long_explanations_arrive_shortened(
    served: Served, stub: GRPCInferenceServiceStub, letter: str, kept: int
) -> None:
    for details in (3_900, 100_000):  # clients refuse large metadata by chance, so once does not tell
        wrong = ConflictError(letter * 100_000, details={"reasons": ["x" * details]})
        served.gateway.fail("identity", *[wrong] * 10)
        for _ in range(10):
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(asking(RAW, raw_input_contents=[bytes(32)]))
            assert refused.value.code() is Code.FAILED_PRECONDITION
            assert refused.value.details() == letter.encode("utf-8", "replace").decode() * kept + "..."


def test_a_fault_of_ours_is_internal_and_tells_nothing(served: Served, stub: GRPCInferenceServiceStub, caplog) -> None:
    served.gateway.fail("identity", ZeroDivisionError("secret"))
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(asking(RAW, raw_input_contents=[bytes(32)]))
    assert refused.value.code() is Code.INTERNAL
    assert "secret" not in refused.value.details()
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    "method",
    [
        "/tensorflow.serving.PredictionService/Predict",
        "/nvidia.inferenceserver.GRPCService/Infer",
        "/inference.GRPCInferenceService/TraceSetting",
        "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions",
    ],
)
def test_other_services_are_told_which_is_spoken(served: Served, method: str) -> None:
    with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(method)(b"\x0a\x03abc", timeout=10)
    assert refused.value.code() is Code.UNIMPLEMENTED
    assert "inference.GRPCInferenceService" in refused.value.details() and method in refused.value.details()
    assert dict(refused.value.trailing_metadata())["narrowboat-error"] == "ProtocolVersionError"


def test_bytes_that_are_no_message_are_refused(served: Served) -> None:
    with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff\xff\xff", timeout=10)
    assert refused.value.code() is Code.INVALID_ARGUMENT
    assert "no ModelInferRequest" in refused.value.details()


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_beyond_the_limit_is_refused(stub: GRPCInferenceServiceStub, compression: Any) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(asking(RAW, raw_input_contents=[bytes(LIMIT + 1)]), compression=compression, timeout=10)
    assert refused.value.code() is Code.RESOURCE_EXHAUSTED


def test_every_call_needs_its_right() -> None:
    asked: dict[str, str] = {}

    def authorise(metadata: Mapping[str, str], right: str) -> None:
        asked[metadata["call"]] = right
        if "authorization" not in metadata:
            raise UnauthorizedError("no token")
        raise ForbiddenError("no right")

    with serving(FakeGateway(), authorise=authorise) as served, grpc.insecure_channel(served.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        known = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
        for method in known[:12]:
            made = getattr(service_pb2, method.input_type.name)()
            for more, code in (((), Code.UNAUTHENTICATED), ((("authorization", "x"),), Code.PERMISSION_DENIED)):
                call = getattr(stub, method.name)
                with pytest.raises(grpc.RpcError) as refused:
                    answer = call(
                        iter([made]) if method.client_streaming else made, metadata=[("call", method.name), *more]
                    )
                    list(answer)
                assert refused.value.code() is code
    opened = {name for name, right in asked.items() if right == "open"}
    admin = {name for name, right in asked.items() if right == "admin"}
    assert opened == {"ServerLive", "ServerReady"}
    assert admin == {"RepositoryModelLoad", "RepositoryModelUnload"}
    assert len(asked) == 12


def test_tls(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    with serving(FakeGateway(), credentials=credentials) as served:
        address = f"localhost:{served.grpc.rpartition(':')[2]}"
        with triton.InferenceServerClient(address, ssl=True, root_certificates=str(certificate)) as client:
            assert np.array_equal(client.infer("identity", [tensor("x", X, "FP32")]).as_numpy("y"), X)
        with triton.InferenceServerClient(served.grpc) as client, pytest.raises(InferenceServerException):
            client.is_server_live()


def test_a_port_that_is_taken_is_a_named_error(served: Served) -> None:
    async def go() -> None:
        with pytest.raises(PortInUseError, match=served.grpc):
            await serve_grpc(FakeGateway(), served.grpc, max_bytes=LIMIT, authorise=allow)

    asyncio.run(go())


def test_calls_whose_message_never_comes_end() -> None:
    with serving(FakeGateway(), idle_seconds=0.1) as served, grpc.insecure_channel(served.grpc) as channel:
        for method in ("ModelInfer", "ModelStreamInfer"):
            silent: queue.Queue[bytes] = queue.Queue()
            call = channel.stream_stream(f"/inference.GRPCInferenceService/{method}")(
                iter(silent.get, None), timeout=10
            )
            with pytest.raises(grpc.RpcError) as refused:
                next(call)
            silent.put(None)
            assert refused.value.code() is Code.DEADLINE_EXCEEDED
            assert "no ModelInferRequest came in 0.1 seconds" in refused.value.details()


def test_a_call_without_a_message_is_refused_and_a_stream_without_any_is_none(served: Served) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        with pytest.raises(grpc.RpcError, match="brought no message"):
            channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")(iter(()), timeout=10)
        assert not list(
            channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter(()), timeout=10)
        )


def test_who_may_not_call_is_refused_before_the_message_comes() -> None:
    def authorise(metadata: Mapping[str, str], right: str) -> None:
        raise UnauthorizedError("no token")

    with serving(FakeGateway(), authorise=authorise) as served, grpc.insecure_channel(served.grpc) as channel:
        silent: queue.Queue[bytes] = queue.Queue()
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer").future(iter(silent.get, None))
        assert call.exception(timeout=10).code() is Code.UNAUTHENTICATED
        silent.put(None)


def test_calls_beyond_the_most_are_refused() -> None:
    gateway = FakeGateway()
    gateway.delay("identity", math.inf)
    with serving(gateway, max_calls=2) as served, grpc.insecure_channel(served.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        held = [stub.ModelInfer.future(asking(RAW, raw_input_contents=[bytes(32)])) for _ in range(2)]
        wait_until(lambda: gateway.running == 2)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=10)
        assert refused.value.code() is Code.RESOURCE_EXHAUSTED
        for call in held:
            call.cancel()
        wait_until(lambda: gateway.cancelled == 2)
