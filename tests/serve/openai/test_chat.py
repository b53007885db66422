"""Conversations through OpenAI's own client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from serve_openai_kit import WINDOW, Talk

MESSAGES: list[Any] = [{"role": "system", "content": "ab"}, {"role": "user", "content": " c "}]


def test_an_answer_in_a_conversation(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("a boat")
    answer = client.chat.completions.create(model="talk", messages=MESSAGES, temperature=0)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "a boat", "stop")
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    wanted = talk.tokens.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert talk.speaker.rows[0] == wanted
    assert answer.usage and answer.usage.prompt_tokens == len(wanted)
    assert answer.model_extra and answer.model_extra["narrowboat"]["admitted"] is True


def test_a_stream_begins_with_who_speaks(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("déjà vu 🚤")
    chunks = list(client.chat.completions.create(model="talk", messages=MESSAGES, temperature=0, stream=True))
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "déjà vu 🚤"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_the_clients_own_helper_gathers_a_stream(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("a boat")
    with client.chat.completions.stream(
        model="talk", messages=MESSAGES, temperature=0, stream_options={"include_usage": True}
    ) as stream:
        for _ in stream:
            pass
        done = stream.get_final_completion()
    assert done.choices[0].message.content == "a boat" and done.usage and done.usage.completion_tokens


def test_without_a_limit_an_answer_goes_to_the_windows_end(talk: Talk, client: openai.OpenAI) -> None:
    talk.speaker.say([40])
    answer = client.chat.completions.create(model="talk", messages=MESSAGES, temperature=0)
    assert answer.choices[0].finish_reason == "length" and answer.usage
    assert answer.usage.total_tokens == WINDOW + 1
    talk.speaker.say([40])
    for name in ("max_tokens", "max_completion_tokens"):
        few = client.chat.completions.create(model="talk", messages=MESSAGES, **{name: 3})  # type: ignore[call-overload]
        assert few.usage.completion_tokens == 3


def test_parts_of_text_and_developers_are_understood(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("x")
    messages: list[Any] = [
        {"role": "developer", "content": "ab"},
        {"role": "user", "content": [{"type": "text", "text": " "}, {"type": "text", "text": "c "}], "name": "me"},
    ]
    client.chat.completions.create(model="talk", messages=messages, temperature=0)
    wanted = talk.tokens.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert talk.speaker.rows[0] == wanted


def test_log_probabilities_name_bytes(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("a boat é🚤")
    answer = client.chat.completions.create(
        model="talk", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None
    assert b"".join(bytes(one.bytes or []) for one in told.content).decode() == "a boat é🚤"
    assert all(len(one.top_logprobs) == 3 for one in told.content)
    assert told.content[0].token == "a" == told.content[0].top_logprobs[0].token


def test_what_is_too_long_is_refused(talk: Talk, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as seen:
        client.chat.completions.create(model="talk", messages=[{"role": "user", "content": "xyz " * WINDOW}])
    assert (seen.value.code, seen.value.param) == ("context_length_exceeded", "messages")
    assert talk.gateway.asked == []


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}], []),
        ("tool_choice", "required", "auto"),
        ("response_format", {"type": "json_object"}, {"type": "text"}),
        ("modalities", ["audio"], ["text"]),
        ("audio", {"voice": "x", "format": "wav"}, None),
        ("logit_processor", "x", None),
        ("web_search_options", {}, None),
        ("store", True, False),
        ("service_tier", "flex", "auto"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    talk: Talk, client: openai.OpenAI, field: str, value: Any, neutral: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as seen:
        client.chat.completions.create(model="talk", messages=MESSAGES, extra_body={field: value})
    assert (seen.value.param, seen.value.code) == (field, "unsupported_parameter")
    talk.say("x")
    made = client.chat.completions.create(model="talk", messages=MESSAGES, extra_body={field: neutral, "user": "me"})
    assert made.choices[0].message.content is not None


def test_the_asynchronous_client_is_served_too(talk: Talk) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{talk.url}/v1", api_key="x", max_retries=0) as client:
            talk.say("a boat")
            whole = await client.chat.completions.create(model="talk", messages=MESSAGES, temperature=0)
            talk.say("a boat")
            stream = await client.chat.completions.create(model="talk", messages=MESSAGES, temperature=0, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == whole.choices[0].message.content == "a boat"

    asyncio.run(run())
