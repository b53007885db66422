"""The two models of the inference part: a vision transformer, and a decoder of eight billion parameters' shape."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.checkpoint.atomic_file import atomic_file
from narrowboat.checkpoint.dtypes import SAFETENSORS_CODES
from narrowboat.checkpoint.files import write_all

DTYPE = torch.bfloat16
_PAGE = 4096

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spec:
    """One model.

    Attributes:
        name: in keys and on the command line.
        label: in tables.
        unit: what the batch counts.
        build: the module, in eval mode.
        inputs: keyword arguments of one pass, by batch.
    """

    name: str
    label: str
    unit: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]

    def skeleton(self) -> nn.Module:
        """The module with its parameters on meta and its buffers real, as accelerate and transformers build it."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            return self.build()


def specs(*, small: bool) -> dict[str, Spec]:
    """By name; ``small``: the same shapes in a few megabytes, for trying the benchmark out."""
    if small:
        vit = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
        vit |= {"image_size": 64, "patch_size": 16, "num_labels": 100}
        decoder = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}
        decoder |= {"intermediate_size": 896, "vocab_size": 2048}
        return {"vit": _vit("ViT, small", vit), "decoder": _decoder("decoder, small", decoder, 64)}
    vit = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    vit |= {"image_size": 224, "patch_size": 16, "num_labels": 1000}
    decoder = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    decoder |= {"intermediate_size": 14336, "vocab_size": 128_256, "rope_theta": 500_000.0}
    return {"vit": _vit("ViT-L/16", vit), "decoder": _decoder("decoder, 8B", decoder, 1024)}


def _vit(label: str, shape: dict[str, int]) -> Spec:
    def build() -> nn.Module:
        from transformers import AutoModelForImageClassification, ViTConfig

        return AutoModelForImageClassification.from_config(ViTConfig(**shape), dtype=DTYPE).eval()

    def inputs(batch: int) -> Inputs:
        generator = torch.Generator().manual_seed(batch)
        side = shape["image_size"]
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator).to(DTYPE)}

    return Spec("vit", label, "images", build, inputs)


def _decoder(label: str, shape: dict[str, Any], length: int) -> Spec:
    def build() -> nn.Module:
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(**shape, max_position_embeddings=8192, use_cache=False, tie_word_embeddings=False)
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()

    def inputs(batch: int) -> Inputs:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(shape["vocab_size"], (batch, length), generator=generator)
        # What comes next is asked for the last place alone, as when a prompt is read.
        return {"input_ids": ids, "logits_to_keep": 1}

    return Spec("decoder", label, f"sequences of {length} tokens", build, inputs)


def to_place(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs with their tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def blocks_path(module: nn.Module) -> str:
    """Where the repeated layers are: the path of the module list with the most parameters."""
    lists = {
        name: child for name, child in module.named_modules() if isinstance(child, (nn.ModuleList, nn.Sequential))
    }
    return max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))


def tensor_shapes(spec: Spec) -> dict[str, torch.Tensor]:
    """The state dict on meta: names, shapes and types, and no bytes."""
    with torch.device("meta"):
        return spec.build().state_dict()


def write_weights(spec: Spec, path: Path, device: torch.device) -> int:
    """Random weights as plain safetensors, one tensor at a time, made on ``device``; returns the tensors' bytes.

    At a scale that keeps activations finite: matrices of variance 1 / fan-in, norms below one.
    """
    tensors = tensor_shapes(spec)
    header = _header(tensors)
    done = 0
    generator = torch.Generator(device).manual_seed(0)
    with atomic_file(path, overwrite=True) as (descriptor, temporary):
        write_all(descriptor, temporary, header, 0)
        for name, like in tensors.items():
            values = _random(name, like, generator, device).reshape(-1).view(torch.uint8).cpu()
            write_all(descriptor, temporary, memoryview(values.numpy().data), len(header) + done)
            done += values.numel()
    return done


def _random(name: str, like: torch.Tensor, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    values = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.ndim >= 2:
        fan_in = math.prod(like.shape[1:]) if "token" not in name else like.shape[-1]
        return values.normal_(0.0, math.sqrt(1.0 / fan_in), generator=generator)
    if name.endswith("weight"):
        return values.uniform_(0.5, 1.0, generator=generator)
    return values.normal_(0.0, 0.05, generator=generator)


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    """The safetensors header, padded with spaces to whole pages: large tensors then begin at a page."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": SAFETENSORS_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _PAGE)
    return len(text).to_bytes(8, "little") + text
