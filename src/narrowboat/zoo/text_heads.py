"""The forward passes of text tasks: a transformers model that takes a window of tokens and gives one row.

The model stays what it is, with its names and its weights; only its class becomes a subclass whose ``forward`` takes
and gives what a task does. Nothing in a pass branches on the values of its inputs: masks are made by arithmetic, and
handed over in four dimensions, in which transformers takes them as they are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from narrowboat.zoo.text_facts import SentenceForm


def give_last_logits(model: Any) -> None:
    """Make ``model`` take ``input_ids`` [1, window] and ``last`` [1], int64, and give float32 logits [1, vocabulary].

    The logits are those of the token after position ``last``. Attention is causal, so what stands to the right of that
    position does not matter.
    """
    kind = type(model)
    _expect_padding(model)
    keeps = "logits_to_keep" in inspect.signature(kind.forward).parameters

    class LastLogits(kind):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
            if keeps:
                out = kind.forward(self, input_ids=input_ids, use_cache=False, return_dict=True, logits_to_keep=last)
                return out.logits[:, 0].float()
            out = kind.forward(self, input_ids=input_ids, use_cache=False, return_dict=True)
            return out.logits.index_select(1, last)[:, 0].float()

    _become(model, LastLogits, kind)


def give_embedding(model: Any, form: SentenceForm) -> None:
    """Make ``model`` take ``input_ids`` and ``attention_mask`` [1, window], int64, and give float32 [1, width].

    The mask is 1 for the sentence's tokens, which stand to the left, and 0 for the padding to their right.
    """
    kind = type(model)
    causal = is_causal(model)
    if causal:
        _expect_padding(model)

    class Sentence(kind):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            base = self.base_model
            given: dict[str, Any] = {"input_ids": input_ids, "return_dict": True}
            if not causal:
                given["attention_mask"] = _hide_padding(attention_mask, base.dtype)
            else:
                given["use_cache"] = False
            out = kind.forward(self, **given) if base is self else base(**given)
            vector = _pool(out.last_hidden_state.float(), attention_mask, form.pooling)
            return F.normalize(vector, p=2.0, dim=1) if form.normalise else vector

    _become(model, Sentence, kind)
    model.sentence_form = (form.pooling, form.normalise)  # what a trace depends on, where `trace_cache` sees it


def is_causal(model: nn.Module) -> bool:
    """Whether its attention looks to the left only."""
    return any(getattr(child, "is_causal", False) is True for child in model.modules())


def _expect_padding(model: Any) -> None:
    """Without a mask transformers looks in each pass for padding to warn of; here it is to the right, unseen."""
    model.config.pad_token_id = None


def _become(model: Any, made: type, kind: type) -> None:
    made.__name__ = made.__qualname__ = f"{kind.__name__}{made.__name__}"
    model.__class__ = made


def _hide_padding(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores [1, 1, window, window]: zero, or the least there is for padding."""
    least = torch.finfo(dtype).min
    added = (1 - mask).to(dtype) * least
    return added[:, None, None, :].expand(1, 1, mask.shape[1], mask.shape[1])


def _pool(hidden: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """One vector [1, width] of the tokens' vectors [1, window, width], as sentence-transformers does it."""
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden.index_select(1, (mask.sum(dim=1) - 1).clamp(min=0))[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if mode == "max":
        return hidden.masked_fill(weights == 0, -1e9).amax(dim=1)
    if mode == "weightedmean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)[None, :, None]
    total = weights.sum(dim=1).clamp(min=1e-9)
    summed = (hidden * weights).sum(dim=1)
    return summed / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)
