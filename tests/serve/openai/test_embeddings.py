"""Embeddings and models through OpenAI's own client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from narrowboat.errors import BeyondContractError
from serve_openai_kit import WIDTH, WINDOW, Talk


def row(talk: Talk, text: str) -> list[float]:
    ids = talk.tokens.encode(text)
    return [float(sum(ids)), float(len(ids)), *[0.0] * (WIDTH - 2)]


def test_texts_are_embedded_in_order(talk: Talk, client: openai.OpenAI) -> None:
    texts = ["a narrowboat", "coal", "日本"]
    made = client.embeddings.create(model="embed", input=texts)  # in base64, as the client asks by itself
    assert [one.embedding for one in made.data] == [row(talk, text) for text in texts]
    assert [one.index for one in made.data] == [0, 1, 2]
    plain = client.embeddings.create(model="embed", input=texts, encoding_format="float", dimensions=WIDTH)
    assert [one.embedding for one in plain.data] == [one.embedding for one in made.data]
    count = sum(len(talk.tokens.encode(text)) for text in texts)
    assert (made.usage.prompt_tokens, made.usage.total_tokens) == (count, count)
    assert made.model_extra and made.model_extra["narrowboat"]["jobs"] == 3


def test_one_text_and_tokens_are_understood(talk: Talk, client: openai.OpenAI) -> None:
    assert client.embeddings.create(model="embed", input="coal").data[0].embedding == row(talk, "coal")
    ids = talk.tokens.encode("coal")
    assert client.embeddings.create(model="embed", input=ids).data[0].embedding == row(talk, "coal")
    both = client.embeddings.create(model="embed", input=[ids, [3, 4]])
    assert [one.embedding[:2] for one in both.data] == [row(talk, "coal")[:2], [7.0, 2.0]]


def test_a_batch_keeps_the_contracts_pace(talk: Talk, client: openai.OpenAI) -> None:
    talk.gateway.fail("embed", BeyondContractError("too soon", retry_after=0.4))
    with pytest.raises(openai.RateLimitError) as seen:
        client.embeddings.create(model="embed", input=["a", "b"])
    assert seen.value.response.headers["retry-after"] == "1"
    talk.gateway.asked.clear()
    infer, refusals = talk.gateway.infer, [BeyondContractError("too soon", retry_after=0.01)] * 2

    async def sometimes(name: str, inputs: Any, **more: Any) -> Any:
        if len(talk.gateway.asked) == 1 and refusals:
            raise refusals.pop()
        return await infer(name, inputs, **more)

    talk.gateway.infer = sometimes  # type: ignore[method-assign]
    try:
        made = client.embeddings.create(model="embed", input=["a", "b"])
    finally:
        del talk.gateway.infer  # type: ignore[method-assign]
    assert [one.embedding for one in made.data] == [row(talk, "a"), row(talk, "b")] and not refusals


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": "xyz " * WINDOW}, "input", "context_length_exceeded"),
        ({"input": [[5] * (WINDOW + 1)]}, "input", "context_length_exceeded"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_type"),
        ({"input": ["a", 5]}, "input", "invalid_type"),
        ({"input": [[400]]}, "input", "invalid_value"),
        ({"input": [-1]}, "input", "invalid_value"),
        ({"input": [True]}, "input", "invalid_value"),
        ({"input": {"a": 1}}, "input", "invalid_type"),
        ({"input": ["a"] * 257}, "input", "invalid_value"),
        ({"input": "a", "dimensions": 4}, "dimensions", "unsupported_parameter"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ({"input": "a", "truncate": True}, "truncate", "unsupported_parameter"),
        ({}, "input", "missing_required_parameter"),
    ],
)
def test_what_cannot_be_embedded_is_refused_before_anything_runs(
    talk: Talk, client: openai.OpenAI, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as seen:
        client.post("/embeddings", body={"model": "embed", **fields}, cast_to=object)
    assert (seen.value.param, seen.value.code) == (param, code)
    assert talk.gateway.asked == []


def test_models_that_run_text_are_listed(talk: Talk, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["embed", "talk"]
    one = client.models.retrieve("talk")
    assert one.object == "model" and one.owned_by == "narrowboat"
    told: Any = one.model_extra
    assert told["narrowboat"]["window"] == WINDOW and told["narrowboat"]["text"] == "causal"
    assert client.models.retrieve("mute").model_extra["narrowboat"]["reason"] == "not admitted"  # type: ignore[index]
    for name in ("image", "nobody"):
        with pytest.raises(openai.NotFoundError) as seen:
            client.models.retrieve(name)
        assert seen.value.code == "model_not_found"


def test_the_asynchronous_client_is_served_too(talk: Talk) -> None:
    async def run() -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{talk.url}/v1", api_key="x", max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["embed", "talk"]
            return (await client.embeddings.create(model="embed", input="coal")).data[0].embedding

    assert asyncio.run(run()) == row(talk, "coal")
