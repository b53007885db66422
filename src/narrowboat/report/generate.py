"""Text from a streamed language model, and what each token of it cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from narrowboat.errors import ModelError, ReservationError, UsageError
from narrowboat.profile.pretrained import check_folder
from narrowboat.stream.api import session
from narrowboat.stream.pretrained import stream_pretrained
from narrowboat.stream.tiers import Budget

_TOLD = 300  # characters of somebody else's message


@dataclass(frozen=True, slots=True)
class GenerateReport:
    """What a generation gave and took.

    Attributes:
        text: the answer, without the prompt.
        token_ids: its tokens.
        prompt_tokens: how many the prompt has.
        first_token_ms: from the start of the model's set-up to the first token.
        tokens_per_s: after the first; None with one token or none.
        bytes_per_token: median bytes read from storage for each token after the first.
        bound_tokens_per_s: what storage allows: its bandwidth over ``bytes_per_token``; None if nothing is read.
        bandwidth_bytes_per_s: of the storage, as measured while the model ran.
        budget_bytes, min_budget_bytes, peak_bytes: as in ``stats()``.
        cache_bytes: of the budget, the key-value cache of ``max_tokens``.
        token_ms: after the first, from token to token.
        predicted_token_ms: of the plan in force at the end, for a pass.
        pass_ms, stall_ms, bytes_read: per pass, the last 256; the first of them is the prompt's.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    first_token_ms: float
    tokens_per_s: float | None
    bytes_per_token: float
    bound_tokens_per_s: float | None
    bandwidth_bytes_per_s: float
    budget_bytes: int
    min_budget_bytes: int
    peak_bytes: int
    cache_bytes: int
    token_ms: list[float] = field(default_factory=list)
    predicted_token_ms: float = 0.0
    pass_ms: list[float] = field(default_factory=list)
    stall_ms: list[float] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)


class _Told:
    """A streamer in transformers' sense: notes when tokens come, and hands on the text that is certain."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._prompt = True
        self._told = ""
        self.ids: list[int] = []
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # comes first, as it was given
            self._prompt = False
            return
        self.ids += value.flatten().tolist()
        self.times.append(time.perf_counter())
        text = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        # A character of several tokens shows as a replacement mark until its last one has come.
        if text.startswith(self._told) and not text.endswith("\ufffd"):
            self._tell(text[len(self._told) :])
            self._told = text

    def end(self) -> None:
        text = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.startswith(self._told):
            self._tell(text[len(self._told) :])
            self._told = text


def generate_text(
    folder: str | Path,
    prompt: str,
    *,
    budget: Budget,
    new_tokens: int,
    max_tokens: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> GenerateReport:
    """Stream the model in ``folder`` and let it go on with ``prompt``.

    Args:
        folder: a Hugging Face folder with a tokenizer.
        prompt: text.
        budget: as for ``nb.stream``.
        new_tokens: at most so many.
        device: as for ``nb.stream``.
        max_tokens: reserved in the budget; None reserves what the prompt and ``new_tokens`` need.
        trust_remote_code: run the Python files of the folder.
        tell: called with each piece of text as it comes.
        options: as for ``generate()``, such as ``do_sample``, ``temperature``.

    Raises:
        ModelError: no tokenizer, or a model that does not generate.
        ReservationError: ``max_tokens`` is less than the prompt and ``new_tokens``.
        NarrowboatError: as ``nb.stream_pretrained``.
    """
    tokenizer = _tokenizer(folder, trust_remote_code)
    given = tokenizer(prompt, return_tensors="pt")
    length = int(given["input_ids"].shape[1])
    if not length:
        raise UsageError("the prompt has no tokens: give --prompt some text")
    needed = length + new_tokens
    if max_tokens is not None and max_tokens < needed:
        raise ReservationError(
            f"the prompt has {length} tokens and {new_tokens} are asked for: max_tokens={max_tokens} is too few, "
            f"{needed} would do"
        )
    begun = time.perf_counter()
    model: Any = stream_pretrained(
        folder,
        budget=budget,
        max_tokens=max_tokens or needed,
        trust_remote_code=trust_remote_code,
        device=device,
    )
    with session(model) as handle:
        if not hasattr(model, "generate"):
            raise ModelError(f"{type(model).__name__} does not generate text")
        told = _Told(tokenizer, tell)
        given = given.to(handle.ground.torch_device)
        with torch.inference_mode():
            model.generate(
                given["input_ids"],
                attention_mask=given.get("attention_mask"),
                max_new_tokens=new_tokens,
                streamer=told,
                **options,
            )
        stats = handle.stats()
    after = stats["bytes_read"][1:] or stats["bytes_read"]
    per_token = float(statistics.median(after)) if after else 0.0
    seconds = told.times[-1] - told.times[0] if len(told.times) > 1 else 0.0
    return GenerateReport(
        text=tokenizer.decode(told.ids, skip_special_tokens=True),
        token_ids=told.ids,
        prompt_tokens=length,
        first_token_ms=(told.times[0] - begun) * 1e3 if told.times else 0.0,
        tokens_per_s=(len(told.times) - 1) / seconds if seconds else None,
        bytes_per_token=per_token,
        bound_tokens_per_s=stats["bandwidth_bytes_per_s"] / per_token if per_token else None,
        bandwidth_bytes_per_s=stats["bandwidth_bytes_per_s"],
        budget_bytes=stats["budget_bytes"],
        min_budget_bytes=stats["min_budget_bytes"],
        peak_bytes=stats["peak_bytes"],
        cache_bytes=stats["fixed_parts"].get("kv-cache", 0),
        token_ms=[(after - before) * 1e3 for before, after in pairwise(told.times)],
        predicted_token_ms=stats["predicted_latency_ms"],
        pass_ms=stats["latency_ms"],
        stall_ms=stats["stall_ms"],
        bytes_read=stats["bytes_read"],
    )


def _tokenizer(folder: str | Path, trust_remote_code: bool) -> Any:
    path = Path(folder).expanduser()
    check_folder(path)
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModelError("model folders need transformers: pip install 'narrowboat[hf]'") from error
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        told = " ".join(str(error).split())[:_TOLD] or type(error).__name__
        raise ModelError(f"{path} has no tokenizer that can be used: {told}") from error
