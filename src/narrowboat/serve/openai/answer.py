"""A request for texts, from its prompts to its answer, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from narrowboat.serve.interface import TaskFace
from narrowboat.serve.openai.bodies import Shape, Usage
from narrowboat.serve.openai.generate import Step, generate
from narrowboat.serve.openai.jobs import Jobs
from narrowboat.serve.openai.schema import Generation
from narrowboat.serve.openai.streams import DONE, event
from narrowboat.serve.openai.tokens import Tokens


@dataclass(frozen=True)
class Prompt:
    """What a text continues.

    Attributes:
        tokens: of it.
        echo: what stands before its completion.
    """

    tokens: list[int]
    echo: str = ""


@dataclass
class Answer:
    """One request under way.

    Attributes:
        face: of the task.
        tokens: of its model.
        jobs: of the request.
        shape: of the answer.
        how: to generate.
        prompts: each with ``how.choices`` texts.
    """

    face: TaskFace
    tokens: Tokens
    jobs: Jobs
    shape: Shape
    how: Generation
    prompts: list[Prompt]

    def __post_init__(self) -> None:
        self._usage = Usage(prompt=sum(len(prompt.tokens) for prompt in self.prompts))

    async def whole(self) -> dict[str, Any]:
        """All texts, one after another.

        Raises:
            RequestError: the first error of any.
        """
        choices = []
        for index, prompt in self._texts():
            steps = [step async for step in self._steps(prompt, index)]
            text = prompt.echo + "".join(step.text for step in steps)
            choices.append(self.shape.choice(index, text, steps, len(prompt.echo)))
        return self.shape.answer(choices, self._usage.told(self.jobs.told()))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events, one for each token that brings text.

        Nothing comes before the first job has ended, so that its refusal can still be an answer of its own.

        Raises:
            RequestError: the first error of any.
        """
        usage = {"usage": None} if self.how.usage else {}
        for index, prompt in self._texts():
            opening: list[bytes] = []
            if self.shape.chat or prompt.echo:
                opening = [event(self.shape.chunk([self.shape.opening(index, prompt.echo)], **usage))]
            waiting: list[Step] = []
            async with aclosing(self._steps(prompt, index)) as steps:
                async for step in steps:
                    for first in opening:
                        yield first
                    opening = []
                    waiting.append(step)
                    if step.text or step.finish is not None:
                        yield self._part(index, prompt, waiting, usage)
                        waiting = []
            if not self._wanted():
                for first in opening:
                    yield first
                yield self._part(index, prompt, [], usage)
        if self.how.usage:
            yield event(self.shape.chunk([], usage=self._usage.told(self.jobs.told())))
        yield DONE

    def _part(self, index: int, prompt: Prompt, steps: list[Step], usage: dict[str, Any]) -> bytes:
        text = "".join(step.text for step in steps)
        told = self.shape.part(index, text, steps, len(prompt.echo))
        ended = {} if told["finish_reason"] is None else {"narrowboat": self.jobs.told()}
        return event(self.shape.chunk([told], **usage, **ended))

    def _texts(self) -> list[tuple[int, Prompt]]:
        return list(enumerate(prompt for prompt in self.prompts for _ in range(self.how.choices)))

    def _wanted(self) -> bool:
        """Whether there is anything to generate; not with ``max_tokens: 0``, which echoes."""
        return self.how.most != 0

    async def _steps(self, prompt: Prompt, index: int) -> AsyncGenerator[Step, None]:
        if not self._wanted():
            return
        made: AsyncIterator[Step] = generate(self.jobs, self.face, self.tokens, prompt.tokens, self.how, index)
        async for step in made:
            self._usage.completion += 1
            yield step
