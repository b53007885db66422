"""A plain decoder with the shape of GPT-2: pre-norm blocks, learned positions, the embedding as head.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2 small: 12 blocks, 768 wide,
124,439,808 parameters). The loss is the caller's: cross entropy of the logits at each place with the next token.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal multi-head self-attention over tokens [batch, length, width]; ``dropout`` is of the attention weights."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, width * 3)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Token ids [batch, length] to next-token logits [batch, length, vocabulary]; GPT-2 small by default.

    Args:
        vocabulary: number of tokens.
        context: largest length.
        width: channels of a token.
        layers: blocks.
        heads: of attention; divides ``width``.
        dropout: probability in training, after the embedding, on attention weights and on each residual branch.
    """

    def __init__(
        self,
        vocabulary: int = 50_257,
        context: int = 1024,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        # GPT-2's scale: the head is the embedding, and one of unit variance would give logits far too large.
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.tokens(ids) + self.positions(places))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def gpt12(dropout: float = 0.0) -> GPT:
    """A smaller one for experiments: 12 blocks, 512 wide, 8,192 tokens, context 512; 42,286,080 parameters."""
    return GPT(vocabulary=8192, context=512, width=512, layers=12, heads=8, dropout=dropout)
