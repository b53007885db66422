"""Small transformers folders as ``save_pretrained`` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def llama(folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Any:
    """Write a llama of some 2 MB into ``folder``; returns the plain model as transformers loads it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(5)
    made = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype)
    made.save_pretrained(folder, max_shard_size=shard)
    return LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()


def t5(folder: Path) -> Any:
    """An encoder-decoder with tied embeddings."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(5)
    config = T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=300, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return T5ForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()


def tokenizer(folder: Path) -> Any:
    """A byte-level tokenizer of 400 tokens, saved beside the model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made)
    fast.save_pretrained(folder)
    return fast
