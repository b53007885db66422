"""What a child process does: load, generate, and tell of each token when it came."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from generate_kit.folders import DECODERS, Folders
from generate_kit.subjects import SUBJECTS
from inference_kit.children import Emit
from narrowboat.machine.malloc import set_malloc_policy
from narrowboat.machine.memory import process_memory, reset_peak
from narrowboat.profile.warmup import warm_up


class Clock:
    """Called by ``generate`` once for each token, right after its pass: a logits processor that changes nothing.

    It is the same for all subjects, and needs nothing but ``generate``. When the time is up it stops the generation
    as a stopping criterion.

    Args:
        emit: takes one ``token`` event per token: seconds since the start, and the token before it.
        start: when the set-up began, by ``time.perf_counter``.
        prompt: tokens in the prompt.
        seconds: no token is begun so long after the first.
        baseline: resident bytes before the set-up.
    """

    def __init__(self, emit: Emit, start: float, prompt: int, seconds: float, baseline: int) -> None:
        self._emit, self._start, self._prompt, self._seconds = emit, start, prompt, seconds
        self._baseline = baseline
        self._first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        now = time.perf_counter()
        self._first = self._first or now
        before = input_ids[0, self._prompt :].tolist()
        self._emit(
            "token",
            seconds=now - self._start,
            before=before[-1] if before else None,
            peak=process_memory().hwm - self._baseline,
        )
        return scores

    def over(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """The stopping criterion."""
        over = self._first is not None and time.perf_counter() - self._first > self._seconds
        return torch.full((input_ids.shape[0],), over, dtype=torch.bool)


def warm_generate() -> None:
    """One small generation: what ``generate`` imports and builds is the process's, whoever runs it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    given = prompt_ids(64, 4)
    with torch.inference_mode():
        model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=2, pad_token_id=0)


def prompt_ids(vocabulary: int, length: int) -> torch.Tensor:
    """The same prompt for everybody: ``length`` token numbers, [1, length]."""
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def run_subject(emit: Emit, name: str, made: Folders, budget: int, prompt: int, tokens: int, seconds: float) -> None:
    """Run one subject.

    Events: ``token`` (see ``Clock``), ``tokens`` (all new ones), ``end``.

    Args:
        emit: takes the events.
        name: the subject.
        made: the decoder at rest.
        budget: bytes above the process baseline.
        prompt: tokens of the prompt.
        tokens: new tokens, the end-of-text token forbidden.
        seconds: no further token is begun so many seconds after the first.
    """
    subject = SUBJECTS[name]
    warm_up()
    warm_generate()
    with torch.device("meta"):
        model: Any = DECODERS[made.name]()  # imports the model's code: that is the process's, whoever runs it
    given = prompt_ids(model.config.vocab_size, prompt)
    del model
    if not subject.ours:
        set_malloc_policy(subject.policy)
    gc.collect()
    reset_peak()
    baseline = process_memory().rss
    start = time.perf_counter()
    running = subject.load(made, budget, prompt + tokens)
    emit("loaded", seconds=time.perf_counter() - start, peak=process_memory().hwm - baseline)
    clock = Clock(emit, start, prompt, seconds, baseline)
    with torch.inference_mode():
        answer = running.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
            logits_processor=[clock],
            stopping_criteria=[clock.over],
        )
    emit("tokens", ids=answer[0, prompt:].tolist())
    emit("end", peak=process_memory().hwm - baseline, baseline=baseline, stats=running.stats())
