"""Requests and answers over HTTP, without a server."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.errors import BadRequestError, NotServingError, RequestError
from narrowboat.serve.interface import Reply
from narrowboat.serve.oip.http_infer import read_ask, write_answer
from serve_kit import FACES, raw, values

X = np.arange(8, dtype="<f4")
JSON = {"name": "x", "shape": [1, 8], "datatype": "FP32", "data": X.tolist()}
BINARY = {"name": "x", "shape": [1, 8], "datatype": "FP32", "parameters": {"binary_data_size": 32}}
LENGTH = "inference-header-content-length"


def ask(told: object, rest: bytes | None = None, face: str = "identity", **headers: str):
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    if rest is not None:
        headers = {LENGTH: str(len(text)), **headers}
    return read_ask(FACES[face], text + (rest or b""), headers)


def test_json_and_binary_say_the_same() -> None:
    one, other = ask({"inputs": [JSON]}), ask({"inputs": [BINARY]}, X.tobytes())
    assert bytes(one.inputs["x"].data) == bytes(other.inputs["x"].data) == X.tobytes()


def test_binary_inputs_are_views_of_the_body() -> None:
    text = json.dumps({"inputs": [BINARY]}).encode()
    body = text + X.tobytes()
    data = read_ask(FACES["identity"], body, {LENGTH: str(len(text))}).inputs["x"].data
    assert isinstance(data, memoryview) and data.obj is body


def test_binary_and_json_inputs_mix_in_any_order() -> None:
    one = {"name": "INPUT1", "shape": [1, 16], "datatype": "INT32", "parameters": {"binary_data_size": 64}}
    other = {"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "data": [list(range(16))]}
    found = ask({"inputs": [one, other]}, bytes(64), "simple").inputs
    assert values(found["INPUT0"]).tolist() == [list(range(16))]
    assert not values(found["INPUT1"]).any()


def test_a_request_without_json_is_the_only_inputs_bytes() -> None:
    found = read_ask(FACES["identity"], X.tobytes(), {LENGTH: "0"})
    assert bytes(found.inputs["x"].data) == X.tobytes()
    assert all(want.binary for want in found.wanted)
    with pytest.raises(BadRequestError, match="for one input"):
        read_ask(FACES["simple"], bytes(128), {LENGTH: "0"})


@pytest.mark.parametrize("given", [250_000, "250000"])
def test_timeout_and_priority_are_numbers_or_their_digits(given: object) -> None:
    found = ask({"inputs": [JSON], "parameters": {"timeout": given, "priority": given}})
    assert (found.timeout, found.priority) == (250_000, 250_000)


def test_the_sooner_of_timeout_and_slo_header_counts() -> None:
    assert ask({"inputs": [JSON], "parameters": {"timeout": 5000}}, **{"x-slo-ttft-ms": "2.5"}).timeout == 2500
    assert ask({"inputs": [JSON], "parameters": {"timeout": 1000}}, **{"x-slo-ttft-ms": "2.5"}).timeout == 1000
    assert ask({"inputs": [JSON], "parameters": {"timeout": 0}}).timeout is None


def test_nan_is_read_as_python_clients_write_it() -> None:
    found = ask({"inputs": [{**JSON, "data": [float("nan"), float("inf"), *range(6)]}]})
    assert np.isnan(values(found.inputs["x"])[0, 0])


def test_an_answer_holds_what_was_asked_for_in_that_order() -> None:
    face = FACES["simple"]
    inputs = [{"name": name, "shape": [1, 16], "datatype": "INT32", "data": [1] * 16} for name in ("INPUT0", "INPUT1")]
    outputs = [{"name": "OUTPUT1", "parameters": {"binary_data": True}}, {"name": "OUTPUT0"}]
    asked = ask({"id": "me", "inputs": inputs, "outputs": outputs}, face="simple")
    made = [raw("INT32", [[k] * 16]) for k in (2, 3)]
    reply = Reply(tuple(zip(face.outputs, made, strict=True)), True, 8_000, 20_000, 1_000, True)
    body, length = write_answer(face, asked, reply)
    told = json.loads(body[:length])
    assert told["id"] == "me"
    assert told["parameters"] == {
        "admitted": True,
        "bound_us": 8_000,
        "deadline_us": 20_000,
        "response_us": 1_000,
        "met": True,
    }
    assert [output["name"] for output in told["outputs"]] == ["OUTPUT1", "OUTPUT0"]
    assert told["outputs"][0]["parameters"] == {"binary_data_size": 64}
    assert told["outputs"][1]["data"] == [2] * 16
    assert body[length:] == made[1].data


@pytest.mark.parametrize(
    ("told", "rest", "said"),
    [
        (b"{", None, "no JSON"),
        (b"", None, "no JSON"),
        (b"[NaN" * 100_000, None, "no JSON"),
        (b"[" * 1_000_000, None, "no JSON"),
        (b"\xff{}", None, "no JSON"),
        (b'{"inputs": [1e400]}', None, "no JSON"),
        (b'{"inputs": [1e400, NaN]}', None, "no JSON"),
        ([], None, "has to be a JSON object"),
        ({}, None, "inputs has to be a list"),
        ({"inputs": {}}, None, "inputs has to be a list"),
        ({"inputs": []}, None, "input x is missing"),
        ({"inputs": ["x"]}, None, r"inputs\[0\] has to be an object"),
        ({"inputs": [{**JSON, "name": "z"}]}, None, "has no input 'z'; it takes x"),
        ({"inputs": [{**JSON, "name": None}]}, None, "has no input"),
        ({"inputs": [{**JSON, "name": ["x"]}]}, None, "has no input"),
        ({"inputs": [JSON, JSON]}, None, "input 'x' is given twice"),
        ({"inputs": [{**JSON, "parameters": 3}]}, None, "parameters has to be an object"),
        ({"inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32"}]}, None, "neither data nor"),
        ({"inputs": [{**JSON, **BINARY}]}, bytes(32), "exclude each other"),
        ({"inputs": [BINARY]}, None, "binary_data_size is 32, but 0 bytes are left"),
        ({"inputs": [BINARY]}, bytes(31), "binary_data_size is 32, but 31 bytes are left"),
        ({"inputs": [BINARY]}, bytes(33), "1 bytes after the JSON text belong to no input"),
        ({"inputs": [{**BINARY, "parameters": {"binary_data_size": 31}}]}, bytes(31), "31 bytes, but FP32"),
        ({"inputs": [{**BINARY, "parameters": {"binary_data_size": -1}}]}, bytes(32), "number of bytes"),
        ({"inputs": [{**BINARY, "parameters": {"binary_data_size": True}}]}, bytes(32), "number of bytes"),
        ({"inputs": [{**BINARY, "parameters": {"binary_data_size": 1e9}}]}, bytes(32), "number of bytes"),
        ({"inputs": [{**BINARY, "parameters": {"binary_data_size": 1 << 62}}]}, bytes(32), "bytes are left"),
        ({"inputs": [{**JSON, "parameters": {"shared_memory_region": "a"}}]}, None, "shared_memory_region is not"),
        ({"inputs": [JSON], "outputs": {}}, None, "outputs has to be a list"),
        ({"inputs": [JSON], "outputs": ["y"]}, None, r"outputs\[0\] has to be an object"),
        ({"inputs": [JSON], "outputs": [{"name": "z"}]}, None, "has no output 'z'; it has y"),
        ({"inputs": [JSON], "outputs": [{"name": "y"}] * 2}, None, "output 'y' is asked for twice"),
        ({"inputs": [JSON], "outputs": [{"name": "y", "parameters": {"classification": 3}}]}, None, "classification"),
        ({"inputs": [JSON], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, None, "true or false"),
        ({"inputs": [JSON], "parameters": {"binary_data_output": "yes"}}, None, "true or false"),
        ({"inputs": [JSON], "parameters": {"sequence_id": 3}}, None, "tasks keep no state"),
        ({"inputs": [JSON], "parameters": {"timeout": -1}}, None, "whole number"),
        ({"inputs": [JSON], "parameters": {"timeout": 1.5}}, None, "whole number"),
        ({"inputs": [JSON], "parameters": {"timeout": True}}, None, "whole number"),
        ({"inputs": [JSON], "parameters": {"timeout": "soon"}}, None, "whole number"),
        ({"inputs": [JSON], "parameters": {"timeout": 1 << 63}}, None, "whole number"),
        ({"inputs": [JSON], "parameters": {"priority": None}}, None, "whole number"),
        ({"inputs": [JSON], "parameters": []}, None, "parameters has to be an object"),
        ({"inputs": [JSON], "id": 3}, None, "id has to be a text"),
        (b'{"id": "\\ud800", "parameters": {"x": NaN}, "inputs": []}', None, "id has to be a text"),
    ],
)
def test_a_request_that_is_wrong_is_refused_with_where_and_what(told: object, rest: bytes | None, said: str) -> None:
    with pytest.raises(BadRequestError, match=said) as refused:
        ask(told, rest)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("length", ["-1", "1e3", "", "abc", "999999", "9" * 100])
def test_a_header_length_that_lies_is_refused(length: str) -> None:
    with pytest.raises(BadRequestError, match="Inference-Header-Content-Length"):
        ask({"inputs": [BINARY]}, X.tobytes(), **{LENGTH: length})


@pytest.mark.parametrize("slo", ["0", "-1", "nan", "inf", "soon", ""])
def test_an_slo_that_is_no_time_is_refused(slo: str) -> None:
    with pytest.raises(BadRequestError, match="x-slo-ttft-ms"):
        ask({"inputs": [JSON]}, **{"x-slo-ttft-ms": slo})


def test_a_task_that_does_not_run_or_takes_no_requests_says_so() -> None:
    with pytest.raises(NotServingError, match="not loaded"):
        ask({"inputs": []}, face="spare")
    with pytest.raises(BadRequestError, match="takes its inputs itself"):
        ask({"inputs": []}, face="camera")


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["x", "FP32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*BINARY, "data"]), inner, max_size=4),
    max_leaves=12,
)
requests = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("id", "inputs", "outputs", "parameters"), json_like)
) | st.fixed_dictionaries({"inputs": st.lists(st.just(JSON) | st.just(BINARY) | json_like, max_size=2)})


@given(requests | json_like, st.none() | st.binary(max_size=40))
def test_whatever_comes_is_taken_or_refused_by_name(told: object, rest: bytes | None) -> None:
    try:
        found = ask(told, rest)
    except RequestError:
        return
    assert memoryview(found.inputs["x"].data).nbytes == 32
