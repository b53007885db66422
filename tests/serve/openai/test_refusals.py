"""Requests that cannot be understood are refused by name, and never crash anything."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest

from narrowboat.serve.openai.openapi import CHAT, COMPLETION, EMBEDDING
from serve_openai_kit import Talk

Post = Callable[[str, Any], httpx.Response]


@pytest.fixture(scope="module")
def web() -> Iterator[httpx.Client]:
    """One connection for all."""
    with httpx.Client(timeout=20) as made:
        yield made


@pytest.fixture
def post(talk: Talk, web: httpx.Client) -> Post:
    """Send a body to one of the endpoints."""

    def send(path: str, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.post(f"{talk.url}/v1/{path}", content=content)

    return send


GOOD: dict[str, dict[str, Any]] = {
    "completions": {"model": "talk", "prompt": "x", "max_tokens": 2},
    "chat/completions": {"model": "talk", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "embeddings": {"model": "embed", "input": "x"},
}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 5}, "model", "invalid_type"),
        ({"model": "image"}, "model", "invalid_value"),
        ({"model": "embed"}, "model", "invalid_value"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": [5, "x"]}, "prompt", "invalid_value"),
        ({"prompt": [1 << 70]}, "prompt", None),
        ({"prompt": ["x"] * 17}, "prompt", "invalid_value"),
        ({"prompt": ["x", "y"], "n": 9}, "n", "invalid_value"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"best_of": True}, "best_of", "unsupported_parameter"),
        ({"echo": True, "logprobs": 1}, "logprobs", "unsupported_parameter"),
        ({"echo": 1}, "echo", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"presence_penalty": 9}, "presence_penalty", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"stop": ["x" * 257]}, "stop", "invalid_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"400": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options", "unsupported_parameter"),
        ({"timeout": 0}, "timeout", "invalid_value"),
        ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
    ],
)
def test_a_wrong_field_is_named(talk: Talk, post: Post, fields: dict[str, Any], param: str, code: str | None) -> None:
    answer = post("completions", {**GOOD["completions"], **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and talk.gateway.asked == []
    if code is not None:  # JSON's own numbers end somewhere
        assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages"),
        ("x", "messages"),
        (["x"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "dog", "content": "x"}], "messages[1].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "more": 1, "audio": {"id": 1}}], "messages[0].audio"),
    ],
)
def test_a_wrong_message_is_named(talk: Talk, post: Post, messages: Any, where: str) -> None:
    answer = post("chat/completions", {"model": "talk", "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, where)


def test_tasks_that_are_not_there_or_not_ready_say_so(talk: Talk, post: Post) -> None:
    missing = post("completions", {**GOOD["completions"], "model": "nobody"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    mute = post("completions", {**GOOD["completions"], "model": "mute"})
    assert mute.status_code == 503 and "not admitted" in mute.json()["error"]["message"]
    other = post("embeddings", {**GOOD["embeddings"], "model": "talk"})
    assert other.status_code == 400 and "/v1/completions" in other.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"\xff", b'{"a":' * 2000, b'"\\ud800"', b"null", b"NaN"])
def test_what_is_no_json_object_is_refused(talk: Talk, post: Post, body: bytes) -> None:
    for path in GOOD:
        answer = post(path, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_strange_bodies_never_fail(talk: Talk, post: Post) -> None:
    rng = random.Random(8)
    strange: list[Any] = [
        None, True, False, 0, -1, 1, 2.5, 1e308, 10**18, "", "x", "\u0000", "😀" * 50, "a" * 5000, [], {}, [[]],
        [None], [{}], {"a": 1}, {"type": "text"}, [[[1]]], ["x", None], [1, 2, 3], [1.5], {"5": "x"},
    ]  # fmt: skip
    talk.speaker.say([5])
    for operation, path in ((COMPLETION, "completions"), (CHAT, "chat/completions"), (EMBEDDING, "embeddings")):
        names = list(operation["requestBody"]["content"]["application/json"]["schema"]["properties"])
        for _ in range(120):
            body = {**GOOD[path], **{name: rng.choice(strange) for name in rng.sample(names, rng.randint(1, 3))}}
            body["model"] = GOOD[path]["model"]
            answer = post(path, body)
            assert answer.status_code in (200, 400, 504), (body, answer.text)
            if answer.status_code == 504:
                assert "timeout" in body


def test_a_folder_without_a_tokenizer_says_so(talk: Talk, post: Post, tmp_path: Any) -> None:
    from serve_openai_kit import text_face

    talk.gateway._faces["bare"] = text_face("bare", tmp_path)
    try:
        answer = post("completions", {**GOOD["completions"], "model": "bare"})
    finally:
        del talk.gateway._faces["bare"]
    assert answer.status_code == 400 and "tokenizer.json" in answer.json()["error"]["message"]


def test_the_published_description_is_whole() -> None:
    from narrowboat.serve.openai.routes import router
    from serve_kit import FakeGateway
    from serve_openai_kit import app_of

    assert router(FakeGateway()).routes
    told = app_of(FakeGateway()).openapi()
    paths = {"/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"}
    assert paths <= set(told["paths"])
    body = told["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", "input"]
