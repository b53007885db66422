"""A Llama-shaped decoder of 1.1 billion parameters in bfloat16, with TinyLlama's shape.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, arXiv:2302.13971; Zhang et al.,
"TinyLlama: An Open-Source Small Language Model", 2024, arXiv:2401.02385.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def build() -> nn.Module:
    """Token ids [batch, length] to an output whose ``logits`` are [batch, length, 32000]; 1,100,048,384 parameters.

    ``use_cache`` is off for a plain call, so that a pass returns its logits and nothing that grows; ``generate``
    makes its own cache as always.
    """
    model = decoder(use_cache=False)
    model.generation_config.use_cache = True
    return model


def decoder(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """The same shape with another configuration.

    Args:
        dtype: of its weights.
        changes: arguments of transformers' ``LlamaConfig``.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings: dict[str, Any] = {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**(settings | changes)), dtype=dtype)
