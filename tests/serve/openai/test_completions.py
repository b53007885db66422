"""Completions through OpenAI's own client."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import openai
import pytest

from serve_openai_kit import WINDOW, Talk

SENTENCE = " carries coal through the rain: déjà vu 🚤"


def test_a_text_is_continued(talk: Talk, client: openai.OpenAI) -> None:
    script = talk.say(SENTENCE)
    answer = client.completions.create(model="talk", prompt="a narrowboat", max_tokens=40, temperature=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (SENTENCE, "stop")
    assert answer.object == "text_completion" and answer.model == "talk" and answer.id.startswith("cmpl-")
    prompt = len(talk.tokens.encode("a narrowboat"))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, len(script) + 1)
    told: Any = answer.model_extra
    assert told["narrowboat"] == {
        "admitted": True,
        "bound_us": 8_000,
        "deadline_us": 20_000,
        "worst_response_us": 1_234,
        "missed": 0,
        "jobs": len(script) + 1,
    }
    assert answer.usage.model_extra == {"narrowboat": told["narrowboat"]}
    assert len(talk.gateway.asked) == len(script) + 1
    # Each job sees what was made before it, and the padding behind.
    assert talk.speaker.rows[3] == talk.tokens.encode("a narrowboat") + script[:3]


def test_a_stream_is_the_same_text_in_pieces(talk: Talk, client: openai.OpenAI) -> None:
    script = talk.say(SENTENCE)
    chunks = list(
        client.completions.create(
            model="talk",
            prompt="x",
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == SENTENCE
    assert not any("�" in chunk.choices[0].text for chunk in chunks[:-1])
    assert len(chunks) > len(SENTENCE.split())
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(script) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-2].model_extra and chunks[-2].model_extra["narrowboat"]["missed"] == 0


def test_a_stream_is_sent_as_events_and_ends_with_done(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("ab")
    with client.completions.with_streaming_response.create(model="talk", prompt="x", stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert all(line.startswith("data: {") for line in lines[:-2:2])
    assert [line for line in lines if line][-1] == "data: [DONE]"


def test_without_max_tokens_there_are_sixteen(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("abcdefghijklmnopqrstuvwxyz" * 2, end=False)
    answer = client.completions.create(model="talk", prompt="x", temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage and answer.usage.completion_tokens == 16


def test_a_text_ends_with_the_window(talk: Talk, client: openai.OpenAI) -> None:
    talk.speaker.say([9])
    answer = client.completions.create(model="talk", prompt=[7] * (WINDOW - 2), max_tokens=40, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage and answer.usage.completion_tokens == 3  # the one behind a full window too
    talk.speaker.say([9])
    full = client.completions.create(model="talk", prompt=[7] * WINDOW, max_tokens=40, temperature=0)
    assert full.usage and full.usage.completion_tokens == 1
    with pytest.raises(openai.BadRequestError) as seen:
        client.completions.create(model="talk", prompt=[7] * (WINDOW + 1))
    assert seen.value.code == "context_length_exceeded" and seen.value.param == "prompt"
    assert f"maximum context length is {WINDOW} tokens" in seen.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(talk: Talk, client: openai.OpenAI, stream: bool) -> None:
    talk.say("one two three four")

    def text(**more: Any) -> tuple[str, str | None]:
        talk.speaker.say(talk.speaker.script)
        given = client.completions.create(model="talk", prompt="x", temperature=0, stream=stream, **more)
        choices = [chunk.choices[0] for chunk in given] if stream else given.choices
        return "".join(choice.text for choice in choices), choices[-1].finish_reason

    assert text(stop=" three", max_tokens=40) == ("one two", "stop")
    jobs = len(talk.gateway.asked)
    assert text(stop=["zzz", "o th"], max_tokens=40) == ("one tw", "stop")
    assert text(stop="four five", max_tokens=40) == ("one two three four", "stop")  # held back, and then said
    assert jobs < len(talk.speaker.script)


def test_the_prompt_is_echoed(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("bc")
    assert client.completions.create(model="talk", prompt="a é ", echo=True, temperature=0).choices[0].text == "a é bc"
    tokens = talk.tokens.encode("a é ")
    talk.say("bc")
    chunks = client.completions.create(model="talk", prompt=tokens, echo=True, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a é bc"
    talk.gateway.asked.clear()
    nothing = client.completions.create(model="talk", prompt="a", echo=True, max_tokens=0)
    assert (nothing.choices[0].text, nothing.choices[0].finish_reason) == ("a", "length")
    streamed = client.completions.create(model="talk", prompt="a", echo=True, max_tokens=0, stream=True)
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in streamed] == [
        ("a", None),
        ("", "length"),
    ]
    assert talk.gateway.asked == []


def test_several_prompts_and_choices_come_in_order(talk: Talk, client: openai.OpenAI) -> None:
    talk.speaker.say([40])
    answer = client.completions.create(model="talk", prompt=["a", "b"], n=2, max_tokens=2, echo=True, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in answer.choices] == ["a", "a", "b", "b"]
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 8)
    chunks = client.completions.create(model="talk", prompt=[[40], [41]], n=1, max_tokens=2, stream=True, seed=1)
    assert [chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason] == [0, 1]


def test_a_seed_makes_the_same_text_again_and_choices_differ(talk: Talk, client: openai.OpenAI) -> None:
    talk.gateway._networks["talk"] = lambda inputs: [_flat()]
    try:

        def texts(**how: Any) -> list[str]:
            made = client.completions.create(model="talk", prompt="x", max_tokens=12, **how)
            return [choice.text for choice in made.choices]

        assert texts(seed=3, n=2) == texts(seed=3, n=2)
        first, second = texts(seed=3, n=2)
        assert first != second and texts(seed=4) != [first]
        assert texts() != texts()
        assert texts(temperature=0) == texts(temperature=0, seed=9)
        assert texts(logit_bias={"41": 100}, temperature=1)[0] == talk.tokens.decode([41] * 12)
        assert texts(extra_body={"top_k": 1}) == texts(extra_body={"top_k": 1})
    finally:
        talk.gateway._networks["talk"] = talk.speaker


def _flat() -> Any:
    from serve_kit import raw

    logits = np.zeros((1, 400))
    logits[0, :10] = -50
    return raw("FP32", logits)


def test_log_probabilities(talk: Talk, client: openai.OpenAI) -> None:
    script = talk.say("né")
    answer = client.completions.create(model="talk", prompt="x", logprobs=2, temperature=0)
    told = answer.choices[0].logprobs
    assert told is not None and told.tokens is not None and told.token_logprobs is not None and told.top_logprobs
    assert len(told.tokens) == len(script) and told.tokens[0] == "n"
    assert all(value is not None and -5 < value < 0 for value in told.token_logprobs)
    assert told.text_offset is not None and told.text_offset[:2] == [0, 1]
    assert len(told.top_logprobs[0]) == 2
    assert max(told.top_logprobs[0].values()) == told.token_logprobs[0]
    assert math.exp(sum(v for v in told.token_logprobs if v is not None)) <= 1


def test_an_empty_prompt_is_the_beginning_of_a_text(talk: Talk, client: openai.OpenAI) -> None:
    talk.say("a")
    client.completions.create(model="talk", prompt="", temperature=0)
    assert talk.speaker.rows[0] == [1]


def test_the_asynchronous_client_is_served_too(talk: Talk) -> None:
    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{talk.url}/v1", api_key="x", max_retries=0) as client:
            talk.say(SENTENCE)
            whole = await client.completions.create(model="talk", prompt="x", max_tokens=40, temperature=0)
            talk.say(SENTENCE)
            stream = await client.completions.create(
                model="talk", prompt="x", max_tokens=40, temperature=0, stream=True
            )
            text = "".join([chunk.choices[0].text async for chunk in stream])
            assert text == whole.choices[0].text
            return text

    assert asyncio.run(run()) == SENTENCE
