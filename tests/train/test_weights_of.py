"""Which models have their weights on storage, and what is said of those that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import narrowboat as nb
from narrowboat.errors import WeightsMismatchError
from narrowboat.train.weights_of import weights_on_storage


class Rotary(nn.Module):
    """A layer with a buffer that no weights file has, as rotary embeddings have one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("inv_freq", torch.ones(4), persistent=False)


def test_buffers_that_no_file_has_are_told_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rotary.safetensors"
    nb.pack(Rotary().state_dict(), path)
    with pytest.raises(WeightsMismatchError, match=r"inv_freq.*nb.stream_pretrained.*init_empty_weights"):
        weights_on_storage(Rotary().to("meta"), path, 1 << 30, store=tmp_path, resume=False)


def test_other_mismatches_have_no_such_hint(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    nb.pack(nn.Linear(4, 4).state_dict(), path)
    model = Rotary()
    model.layer.to("meta")
    with pytest.raises(WeightsMismatchError, match=r"layer.weight is missing") as refused:
        weights_on_storage(model, path, 1 << 30, store=tmp_path, resume=False)
    assert "stream_pretrained" not in str(refused.value)
