"""A decoder of the kind that SwapNet's authors look forward to: the same tokens in a part of its bytes."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch

import narrowboat as nb
from inference_kit.children import Emit
from narrowboat.profile.warmup import warm_up
from narrowboat.quantities import format_bytes
from papers_kit.check import Bench, Measurement

_SHARE = 0.45  # of the weights
_TOKENS = 12


def decoding(bench: Bench) -> Measurement:
    """Greedy tokens of a small Llama with random weights, plain and streamed."""
    folder = bench.work / "small-llama"
    if not folder.exists():
        bench.apart("decoder-folder", partial(_make, folder), 120)
    plain = bench.apart("decoder-plain", partial(_plain, folder), 120)
    ours = bench.apart("decoder-streamed", partial(_streamed, folder), 120)
    return {
        "weights": format_bytes(plain["weights"]),
        "budget": format_bytes(ours["budget"]),
        "peak": format_bytes(ours["peak"]),
        "tokens": len(ours["tokens"]),
        "same_tokens": ours["tokens"] == plain["tokens"],
        "within_budget": ours["peak"] <= ours["budget"],
        "class_kept": ours["name"] == plain["name"],
    }


def _make(folder: Path, emit: Emit) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=640, intermediate_size=1728, num_hidden_layers=10, num_attention_heads=10, vocab_size=4096
    )
    part = folder.with_suffix(".part")
    LlamaForCausalLM(config).save_pretrained(part)
    os.replace(part, folder)


def _tokens(model: torch.nn.Module) -> list[int]:
    ids = torch.arange(1, 9)[None]
    generate = model.generate
    assert callable(generate)
    with torch.inference_mode():
        found = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_TOKENS, do_sample=False)
    return [int(token) for token in found[0, ids.shape[1] :]]


def _plain(folder: Path, emit: Emit) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = sum(p.nbytes for p in model.parameters())
    emit("measured", tokens=_tokens(model), weights=weights, name=type(model).__name__)


def _streamed(folder: Path, emit: Emit) -> None:
    warm_up()
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    budget = int(weights * _SHARE)
    model = nb.stream_pretrained(folder, budget=budget, max_tokens=64)
    tokens = _tokens(model)
    peak = nb.session(model).stats()["peak_bytes"]
    emit("measured", tokens=tokens, budget=budget, peak=peak, name=type(model).__name__)
