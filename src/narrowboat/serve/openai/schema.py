"""What may be asked: completions, chats and embeddings, read from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from narrowboat.errors import BadRequestError
from narrowboat.serve.openai.errors import wrong
from narrowboat.serve.openai.fields import Fields, texts_or_tokens
from narrowboat.serve.openai.sampling import Sampling

MOST_TEXTS = 16  # that one request may ask for: prompts times choices
MOST_INPUTS = 256  # of one request for embeddings
_STOPS, _STOP_LETTERS = 16, 256
_MOST_TOKENS = 1 << 20
_ROLES = ("system", "developer", "user", "assistant", "tool")
_HOUR = 3_600_000_000  # microseconds


@dataclass(frozen=True)
class Wish:
    """What is wanted of the deadline.

    Attributes:
        timeout: microseconds within which the first job has to be done; None for the task's own.
        priority: among requests that are promised nothing.
    """

    timeout: int | None = None
    priority: int = 0


@dataclass(frozen=True)
class Generation:
    """How to generate.

    Attributes:
        sampling: of tokens.
        most: tokens of one text; None up to the end of the window.
        stops: strings that end a text.
        choices: texts for each prompt.
        stream: token by token.
        usage: tell it at the end of a stream.
        logprobs: of so many of the most probable tokens; None for not at all.
        wish: of the deadline.
    """

    sampling: Sampling
    most: int | None
    stops: tuple[str, ...]
    choices: int
    stream: bool
    usage: bool
    logprobs: int | None
    wish: Wish


@dataclass(frozen=True)
class CompletionRequest:
    """``POST /v1/completions``.

    Attributes:
        prompts: texts, or their tokens.
        echo: the prompt before its completion.
        how: to generate.
    """

    prompts: list[str | list[int]]
    echo: bool
    how: Generation


@dataclass(frozen=True)
class ChatRequest:
    """``POST /v1/chat/completions``.

    Attributes:
        messages: with ``role`` and ``content``.
        how: to generate.
    """

    messages: list[dict[str, Any]]
    how: Generation


@dataclass(frozen=True)
class EmbeddingRequest:
    """``POST /v1/embeddings``.

    Attributes:
        inputs: texts, or their tokens.
        base64: the numbers' bytes instead of the numbers.
        wish: of the deadline.
    """

    inputs: list[str | list[int]]
    base64: bool
    wish: Wish


def read_completion(fields: Fields, vocabulary: int, header: str | None) -> CompletionRequest:
    """A request without its ``model``.

    Args:
        fields: of the body.
        vocabulary: tokens of the model.
        header: ``x-slo-ttft-ms``.

    Raises:
        BadRequestError: something cannot be understood, or not be honoured; it is named.
    """
    prompts = texts_or_tokens(fields.take("prompt", ""), vocabulary, "prompt", MOST_TEXTS)
    echo = fields.truth("echo")
    fields.only("suffix", "")
    fields.only("best_of", 1)
    logprobs = fields.whole("logprobs", 0, 20)
    if echo and logprobs is not None:
        raise wrong("logprobs", "those of the prompt are not computed: leave out echo", "unsupported_parameter")
    most = fields.whole("max_tokens", 0 if echo else 1, _MOST_TOKENS)
    how = _generation(fields, vocabulary, 16 if most is None else most, logprobs, header, len(prompts))
    fields.finish()
    return CompletionRequest(prompts, echo, how)


def read_chat(fields: Fields, vocabulary: int, header: str | None) -> ChatRequest:
    """As :func:`read_completion`."""
    messages = _messages(fields.take("messages"))
    most = fields.whole("max_completion_tokens", 1, _MOST_TOKENS)
    older = fields.whole("max_tokens", 1, _MOST_TOKENS)
    wanted, best = fields.truth("logprobs"), fields.whole("top_logprobs", 0, 20)
    if best is not None and not wanted:
        raise wrong("top_logprobs", "needs logprobs: true")
    fields.only("tools", [])
    fields.only("functions", [])
    fields.only("tool_choice", "none", "auto")
    fields.only("function_call", "none", "auto")
    fields.only("response_format", {"type": "text"})
    fields.only("modalities", ["text"])
    fields.only("store", False)
    fields.ignore("parallel_tool_calls")
    how = _generation(fields, vocabulary, older if most is None else most, (best or 0) if wanted else None, header, 1)
    fields.finish()
    return ChatRequest(messages, how)


def read_embedding(fields: Fields, vocabulary: int, width: int, header: str | None) -> EmbeddingRequest:
    """As :func:`read_completion`; ``width`` is that of the model's embeddings."""
    given = fields.take("input")
    if given is None:
        raise wrong("input", "is missing", "missing_required_parameter")
    inputs = texts_or_tokens(given, vocabulary, "input", MOST_INPUTS)
    if any(not one for one in inputs):
        raise wrong("input", "holds an empty text")
    form = fields.take("encoding_format", "float")
    if form not in ("float", "base64"):
        raise wrong("encoding_format", "is neither 'float' nor 'base64'")
    fields.only("dimensions", width)
    fields.ignore("user")
    wish = _wish(fields, header)
    fields.finish()
    return EmbeddingRequest(inputs, form == "base64", wish)


def _generation(
    fields: Fields, vocabulary: int, most: int | None, logprobs: int | None, header: str | None, prompts: int
) -> Generation:
    choices = fields.whole("n", 1, MOST_TEXTS) or 1
    if choices * prompts > MOST_TEXTS:
        raise wrong("n", f"{choices} texts for each of {prompts} prompts; up to {MOST_TEXTS} are allowed at once")
    sampling = Sampling(
        temperature=fields.number("temperature", 0, 2, 1.0),
        top_p=fields.number("top_p", 0, 1, 1.0),
        top_k=max(fields.whole("top_k", -1, _MOST_TOKENS) or 0, 0),
        seed=fields.whole("seed", -(1 << 63), (1 << 64) - 1),
        presence=fields.number("presence_penalty", -2, 2, 0.0),
        frequency=fields.number("frequency_penalty", -2, 2, 0.0),
        bias=_bias(fields.take("logit_bias", {}), vocabulary),
    )
    stream = fields.truth("stream")
    usage = _usage(fields.take("stream_options"), stream)
    fields.only("service_tier", "auto", "default")
    fields.ignore("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
    return Generation(
        sampling, most, _stops(fields.take("stop", [])), choices, stream, usage, logprobs, _wish(fields, header)
    )


def _wish(fields: Fields, header: str | None) -> Wish:
    """The body's ``timeout`` in microseconds, as the Open Inference Protocol has it, or the header's milliseconds."""
    timeout = fields.whole("timeout", 1, _HOUR)
    if header is not None:
        try:
            told = int(float(header) * 1000)
        except (ValueError, OverflowError):
            told = 0
        if not 0 < told <= _HOUR:
            raise wrong("x-slo-ttft-ms", f"is {header[:40]!r}, not a number of milliseconds")
        timeout = told if timeout is None else min(timeout, told)
    return Wish(timeout, fields.whole("priority", 0, (1 << 31) - 1) or 0)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or any(not isinstance(one, str) for one in stops):
        raise wrong("stop", "is neither a string nor a list of strings", "invalid_type")
    if len(stops) > _STOPS or any(len(one) > _STOP_LETTERS for one in stops):
        raise wrong("stop", f"up to {_STOPS} strings of up to {_STOP_LETTERS} letters are allowed")
    return tuple(one for one in stops if one)


def _usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise wrong("stream_options", "needs stream: true")
    if not isinstance(options, dict):
        raise wrong("stream_options", "is no object", "invalid_type")
    inner = Fields(options)
    usage = inner.truth("include_usage")
    inner.ignore("include_obfuscation")
    try:
        inner.finish()
    except BadRequestError as error:
        raise wrong("stream_options", str(error), "unsupported_parameter") from error
    return usage


def _bias(told: Any, vocabulary: int) -> Mapping[int, float]:
    if not isinstance(told, dict):
        raise wrong("logit_bias", "is no object of tokens and numbers", "invalid_type")
    inner, found = Fields(told), {}
    for name in told:
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < vocabulary):
            raise wrong("logit_bias", f"{name[:40]!r} is no token; they go from 0 to {vocabulary - 1}")
        try:
            found[int(name)] = inner.number(name, -100, 100, 0.0)
        except BadRequestError as error:
            raise wrong("logit_bias", str(error)) from error
    return found


def _messages(told: Any) -> list[dict[str, Any]]:
    if not isinstance(told, list) or not told:
        raise wrong("messages", "is no list of messages", "invalid_type" if told else "missing_required_parameter")
    return [_message(one, f"messages[{at}]") for at, one in enumerate(told)]


def _message(told: Any, where: str) -> dict[str, Any]:
    if not isinstance(told, dict):
        raise wrong(where, "is no object", "invalid_type")
    fields = Fields(told)
    role = fields.text("role") if isinstance(told.get("role"), str) else ""
    if role not in _ROLES:
        raise wrong(f"{where}.role", f"is none of {', '.join(_ROLES)}")
    content = _content(fields.take("content", ""), where)
    fields.ignore("name", "refusal", "annotations", "tool_call_id")
    for name in ("tool_calls", "function_call", "audio"):
        if fields.take(name):
            raise wrong(f"{where}.{name}", "is not supported here", "unsupported_parameter")
    return {"role": "system" if role == "developer" else role, "content": content}


def _content(told: Any, where: str) -> str:
    if isinstance(told, str):
        return told
    if not isinstance(told, list):
        raise wrong(f"{where}.content", "is neither a string nor a list of parts", "invalid_type")
    for part in told:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(f"{where}.content", "only parts of type 'text' are supported", "unsupported_parameter")
    return "".join(part["text"] for part in told)
