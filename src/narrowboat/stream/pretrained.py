"""``nb.stream_pretrained``: a model folder whose ``generate`` runs inside a budget, key-value cache included."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.errors import ReservationError, UsageError
from narrowboat.profile.pretrained import Pretrained, first_input, open_pretrained, positions
from narrowboat.stream.api import stream
from narrowboat.stream.tiers import Budget

_DEFAULT_TOKENS = 1024


def stream_pretrained(
    folder: str | Path,
    *,
    budget: Budget,
    max_tokens: int | None = None,
    example: tuple[Any, ...] | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> nn.Module:
    """A transformers model from a local folder, of its own class, running from storage within ``budget`` bytes.

    ``.generate()`` works with all its options. The key-value cache and the activations of the longest prompt are
    part of the budget: ``max_tokens`` says for how many tokens, and a call that would need more is refused before it
    runs.

    Args:
        folder: with ``config.json`` and weights (safetensors, sharded or not, or ``.bin``); nothing is downloaded.
        budget: as for ``nb.stream``.
        max_tokens: tokens in the cache at once, prompt and answer, over all sequences (beams count as sequences).
            None: 1,024, or the model's positions if those are fewer.
        example: inputs of one pass, where the model takes neither token numbers nor pixels.
        trust_remote_code: run the Python files that the folder brings.
        options: as for ``nb.stream``: ``device``, ``io``, ``lock_memory``, ``scheme``, ``objective``.

    Raises:
        ModelError: see ``profile.pretrained.open_pretrained``.
        BudgetError: the budget cannot hold the model and its cache; ``.minimum`` is the smallest that can.
        ReservationError: later, from a call that needs more than ``max_tokens``.
    """
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
        raise UsageError(f"max_tokens must be a positive number of tokens, not {max_tokens!r}")
    opened = open_pretrained(folder, trust_remote_code=trust_remote_code)
    tokens = max_tokens or min(_DEFAULT_TOKENS, positions(opened.config))
    if example is None:
        example = example_inputs(opened, tokens)
    model = stream(opened.model, opened.index, budget=budget, example=example, strict=False, **options)
    whole: Any = model
    encoder = whole.get_encoder() if getattr(opened.config, "is_encoder_decoder", False) else None
    for part in (model, encoder):  # generate() calls the encoder by itself
        if part is not None and "input_ids" in inspect.signature(type(part).forward).parameters:
            _guard(part, tokens)
    return model


def example_inputs(opened: Pretrained, tokens: int) -> dict[str, Any] | None:
    """Inputs of the largest pass that ``tokens`` tokens of cache allow; None if the model takes something else."""
    parameters = inspect.signature(type(opened.model).forward).parameters
    length = min(tokens, positions(opened.config))
    first = first_input(opened, -(-tokens // length), length)
    if first is None:
        return None
    name = getattr(opened.model, "main_input_name", "input_ids")
    if name == "pixel_values":
        return {name: first[:1]}
    given: dict[str, Any] = {name: first}
    if getattr(opened.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = torch.zeros_like(first)
    if "use_cache" in parameters:
        given["use_cache"] = True
    if "logits_to_keep" in parameters:
        given["logits_to_keep"] = 1  # what generate() asks for
    return given


def _guard(model: nn.Module, tokens: int) -> None:
    """Refuse passes that need more cache than was reserved, before they run."""
    forward = model.forward
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    @functools.wraps(forward)
    def reserved_forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        needed = tokens_needed(given)
        if needed > tokens:
            raise ReservationError(
                f"this call needs a cache of {needed} tokens, and {tokens} are reserved in the budget: shorten the "
                f"prompt or the answer, use fewer sequences or beams, or stream with max_tokens={needed} or more"
            )
        return forward(*args, **kwargs)

    model.forward = reserved_forward


def tokens_needed(given: Mapping[str, Any]) -> int:
    """Tokens that the cache holds after a call with these arguments, over all its sequences.

    An encoder's tokens count apart from the decoder's: as many of each are reserved.
    """
    needed = _encoded_tokens(given.get("encoder_outputs"))
    for ids_name, embeds_name in (("input_ids", "inputs_embeds"), ("decoder_input_ids", "decoder_inputs_embeds")):
        ids = given.get(ids_name)
        tensor = ids if ids is not None else given.get(embeds_name)
        if isinstance(tensor, torch.Tensor):
            rows, length = (tensor.shape[0], tensor.shape[1]) if tensor.ndim > 1 else (1, tensor.shape[0])
            grows = ids_name == "decoder_input_ids" or "decoder_input_ids" not in given
            past = _past_tokens(given.get("past_key_values")) if grows else 0
            needed = max(needed, rows * max(length + past, _static_tokens(given.get("past_key_values"))))
    return needed


def _encoded_tokens(outputs: Any) -> int:
    """Tokens for which cross-attention keeps keys and values: every sequence, and every beam, has its own."""
    try:
        last = outputs[0]
    except (TypeError, IndexError, KeyError):
        return 0
    return last.shape[0] * last.shape[1] if isinstance(last, torch.Tensor) and last.ndim == 3 else 0


def _past_tokens(cache: Any) -> int:
    try:
        return int(cache.get_seq_length()) if cache is not None else 0
    except (AttributeError, TypeError, IndexError, NotImplementedError):
        return 0


def _static_tokens(cache: Any) -> int:
    """Tokens per sequence for which a static cache takes memory at once."""
    cache = getattr(cache, "self_attention_cache", cache)
    sizes = [getattr(layer, "max_cache_len", 0) for layer in getattr(cache, "layers", None) or ()]
    return max((size for size in sizes if isinstance(size, int)), default=0)
