"""Answers in the shapes that OpenAI's clients know."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from narrowboat.serve.openai.generate import Step
from narrowboat.serve.openai.tokens import Tokens


@dataclass
class Usage:
    """Tokens of one request.

    Attributes:
        prompt: that were given.
        completion: that were made, the one that ended a text too.
    """

    prompt: int = 0
    completion: int = 0

    def told(self, narrowboat: dict[str, Any]) -> dict[str, Any]:
        """As an answer has it; ``narrowboat``: how the jobs went."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "narrowboat": narrowboat,
        }


@dataclass
class Shape:
    """What differs between completions and chats.

    Args:
        chat: it is a chat.
        model: the task.
        tokens: of its model.

    Attributes:
        identity: of the answer.
        created: Unix seconds.
    """

    chat: bool
    model: str
    tokens: Tokens
    identity: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole."""
        return {
            **self._head(chunk=False),
            "choices": choices,
            "usage": usage,
            "narrowboat": usage["narrowboat"],
        }

    def choice(self, index: int, text: str, steps: list[Step], offset: int) -> dict[str, Any]:
        """One text of the whole; ``offset``: letters of an echo before it."""
        finish = steps[-1].finish if steps else "length"
        told = {"index": index, "finish_reason": finish, "logprobs": self._logprobs(steps, offset)}
        return {**told, "message": {"role": "assistant", "content": text}} if self.chat else {**told, "text": text}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A part of a stream."""
        return {**self._head(chunk=True), "choices": choices, **more}

    def opening(self, index: int, text: str) -> dict[str, Any]:
        """The first part of a choice: who speaks, or what is echoed."""
        told: dict[str, Any] = {"index": index, "finish_reason": None, "logprobs": None}
        return {**told, "delta": {"role": "assistant", "content": ""}} if self.chat else {**told, "text": text}

    def part(self, index: int, text: str, steps: list[Step], offset: int) -> dict[str, Any]:
        """More of a choice."""
        finish = steps[-1].finish if steps else "length"
        told = {"index": index, "finish_reason": finish, "logprobs": self._logprobs(steps, offset)}
        return {**told, "delta": {"content": text} if text else {}} if self.chat else {**told, "text": text}

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.identity}",
            "object": f"{kind}.chunk" if self.chat and chunk else kind,
            "created": self.created,
            "model": self.model,
        }

    def _logprobs(self, steps: list[Step], offset: int) -> dict[str, Any] | None:
        known = [(step, *step.scored) for step in steps if step.scored is not None]
        if not known:
            return None
        if self.chat:
            content = [
                {**self._token(one.token, one.logprob), "top_logprobs": [self._token(t.token, t.logprob) for t in top]}
                for _, one, top in known
            ]
            return {"content": content, "refusal": None}
        shown = self.tokens.shown
        return {
            "tokens": [shown(one.token) for _, one, _ in known],
            "token_logprobs": [one.logprob for _, one, _ in known],
            "top_logprobs": [{shown(t.token): t.logprob for t in top} for _, _, top in known],
            "text_offset": [offset + step.before for step, _, _ in known],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.tokens.shown(token), "logprob": logprob, "bytes": list(self.tokens.raw(token))}
