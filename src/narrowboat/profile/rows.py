"""Tables larger than the budget: a lookup reads the rows it asks for, and nothing else of the table enters memory."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from narrowboat.arena.slot import Weight

GATHER = 1 << 20  # bytes of rows on their way at a time: what a lookup takes beside its output
_INDEX_BYTES = 128  # per index: sorted, its place, where its row begins in the file and in memory


class RowSource(Protocol):
    """Reads rows of a weight from storage (the session's reader)."""

    def fetch(self, weight: Weight, rows: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
        """``out[places[i]] = weight[rows[i]]``; ``rows`` sorted, both int64 and flat."""


def embedding_forward(self: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
    """``nn.Embedding.forward`` on rows read for the purpose: copies of the table's bytes, so the same bits."""
    source, weight = self.__dict__["_narrowboat_rows"]
    flat = _checked(self.num_embeddings, weight, input)
    ordered, places = torch.sort(flat)
    out = torch.empty((flat.numel(), self.embedding_dim), dtype=weight.entry.dtype)
    source.fetch(weight, ordered, places, out)
    return out.view(*input.shape, self.embedding_dim)


def bag_forward(
    self: nn.EmbeddingBag,
    input: torch.Tensor,
    offsets: torch.Tensor | None = None,
    per_sample_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """``nn.EmbeddingBag.forward`` on a table of only the rows asked for."""
    source, weight = self.__dict__["_narrowboat_rows"]
    flat = _checked(self.num_embeddings, weight, input)
    unique, renumbered = torch.unique(flat, sorted=True, return_inverse=True)
    # One row at least: the operator wants a table even where nothing is looked up.
    table = torch.zeros((max(unique.numel(), 1), self.embedding_dim), dtype=weight.entry.dtype)
    source.fetch(weight, unique, torch.arange(unique.numel()), table)
    padding = self.padding_idx
    if padding is not None:
        at = int(torch.searchsorted(unique, padding))
        padding = at if at < unique.numel() and int(unique[at]) == padding else None
    return F.embedding_bag(
        renumbered.view(input.shape).to(input.dtype),
        table,
        offsets,
        None,
        2.0,
        self.scale_grad_by_freq,
        self.mode,
        self.sparse,
        per_sample_weights,
        self.include_last_offset,
        padding,
    )


def _checked(rows: int, weight: Weight, indices: Any) -> torch.Tensor:
    """The indices flat, as int64. Raises what PyTorch raises where they are none, or none of the table's."""
    if not isinstance(indices, torch.Tensor) or indices.dtype not in (torch.int64, torch.int32):
        F.embedding(indices, torch.empty((1, 1), dtype=weight.entry.dtype))  # in PyTorch's own words
    flat: torch.Tensor = indices.reshape(-1).long()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= rows):
        raise IndexError(f"index out of range in self: {weight.name!r} has {rows} rows")
    return flat


def gather_bytes(kind: type[nn.Module], indices: int, row_bytes: int) -> int:
    """Bytes that a lookup of so many indices takes at most, its output apart."""
    rows = indices * row_bytes if kind is nn.EmbeddingBag else 0
    return rows + 2 * max(GATHER, row_bytes + (2 << 12)) + indices * _INDEX_BYTES
