"""Small networks for tests of pipelines, importable on every node; and their weights in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from narrowboat.checkpoint import pack
from narrowboat.zoo.gpt import GPT
from narrowboat.zoo.resnet import ResNet
from narrowboat.zoo.vit import VisionTransformer


def vit() -> nn.Module:
    """A ViT of six blocks."""
    return VisionTransformer(image=64, patch=16, width=128, layers=6, heads=4, hidden=512, classes=10).eval()


def resnet() -> nn.Module:
    """A ResNet of eight blocks; residual sums, batch normalisation, activations in place."""
    return ResNet((2, 2, 2, 2), 10).eval()


def bert() -> nn.Module:
    """A BERT of four layers, two hundred tokens."""
    from narrowboat.zoo.bert import small

    return small(vocab_size=200, hidden_size=64, intermediate_size=256).eval()


def gpt() -> nn.Module:
    """A decoder whose head is its embedding: a weight that the first and the last stage share."""
    return GPT(200, 32, 64, 4, 4).eval()


def llama() -> nn.Module:
    """A transformers decoder of six layers; rotary positions and a mask are made once and used in every layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=False)).eval()


def llama_uncached() -> nn.Module:
    """The same, told to keep no cache."""
    module = llama()
    module.config.use_cache = False  # type: ignore[union-attr]
    return module


class Skips(nn.Module):
    """A tensor of the first layer is used again by the last; another changes in place after it was kept as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        early = self.layers[0](x)
        seen = early[:, ::2]
        y = early
        for layer in self.layers[1:5]:
            y = torch.tanh(layer(y))
        early.mul_(2.0)
        return self.layers[5](y) + early, {"seen": seen}


class Decides(nn.Module):
    """Which layer comes next depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if x.sum() > 0 else self.two(x)


class Counts(nn.Module):
    """Keeps how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x)


class Draws(nn.Module):
    """Dropout in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.layer(x), 0.5, training=True)


def ids(vocabulary: int = 200, shape: tuple[int, int] = (2, 16)) -> torch.Tensor:
    """Token ids, the same every time."""
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(3))


def image(size: int = 64) -> torch.Tensor:
    """Two images, the same every time."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))


def made(factory: Callable[[], nn.Module], folder: Path, *, packed: bool = True) -> tuple[nn.Module, Path]:
    """The module with random weights, and its weights file."""
    torch.manual_seed(1)
    module = factory()
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2)
    path = folder / f"{getattr(factory, '__name__', 'model')}.safetensors"
    if packed:
        pack(module.state_dict(), path)
    else:
        from safetensors.torch import save_model

        save_model(module, str(path))
    return module, path
