"""A small decoder at rest, and models whose weights are on storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import narrowboat as nb
from train_weights_kit import Decoder
from train_weights_kit import decoder as make_decoder


@pytest.fixture(scope="session")
def decoder_at_rest(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_decoder(tmp_path_factory.mktemp("decoder"), num_hidden_layers=5)


@pytest.fixture(scope="session")
def tied_at_rest(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_decoder(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def packed(decoder_at_rest: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder's weights packed: read without copies."""
    path = tmp_path_factory.mktemp("packed") / "decoder.safetensors"
    nb.pack(decoder_at_rest.folder, path)
    return path


@pytest.fixture
def decoder(decoder_at_rest: Decoder) -> Iterator[Decoder]:
    yield from _lent(decoder_at_rest)


@pytest.fixture
def tied(tied_at_rest: Decoder) -> Iterator[Decoder]:
    yield from _lent(tied_at_rest)


def _lent(kept: Decoder) -> Iterator[Decoder]:
    lent = Decoder(kept.folder, kept.plain, kept.ids)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lent
    torch.set_num_threads(threads)
    for weights in lent.opened:
        weights.close()
