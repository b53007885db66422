"""LoRA and last-layer tuning with the frozen weights on storage: plain training's bits in a quarter of the bytes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import narrowboat as nb
from narrowboat.arena.standin import is_standin
from narrowboat.train.weights import TrainingWeights
from train_weights_kit import Decoder, gradients_equal, steps_agree, with_lora


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("from_packed", [False, True])
def test_lora_steps_have_the_bits_of_training_in_memory(
    decoder: Decoder, packed: Path, poison: bool, from_packed: bool
) -> None:
    model, optimizer = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model, packed if from_packed else None)
    # After each operator everything is let go and overwritten with NaN: whatever autograd kept of it would show.
    weights.window.poison = poison
    assert steps_agree(decoder, model, weights, optimizer)
    assert weights.window.escaped_bytes == 0
    assert weights.peak_bytes <= weights.window.held_bytes <= decoder.total // 4


def test_after_the_first_step_everything_is_read_ahead_and_little_twice(decoder: Decoder, packed: Path) -> None:
    model, optimizer = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model, packed)
    assert steps_agree(decoder, model, weights, optimizer, 2)
    demanded, before = weights.window.demanded, weights.bytes_read
    weights.begin_step()
    decoder.loss(model).backward()
    weights.end_step()
    assert weights.window.demanded == demanded
    assert weights.window.order.departures == 0
    # Forward and backward each find what the other used last: Belady's rule reads all but the window, twice.
    room = weights.budget
    assert weights.bytes_read - before <= 2 * (weights.total_bytes - room) + room // 2


def test_operators_run_while_the_reader_is_slow(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def slow(*args: Any) -> int:
        time.sleep(0.0005)
        return preadv(*args)

    model, optimizer = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model)
    monkeypatch.setattr(os, "preadv", slow)
    assert steps_agree(decoder, model, weights, optimizer)


def test_tied_embeddings_are_one_weight(tied: Decoder) -> None:
    model, optimizer = with_lora(tied.skeleton())
    weights = tied.on_storage(model, budget=tied.total // 3)
    weights.window.poison = True
    assert steps_agree(tied, model, weights, optimizer)
    assert weights.total_bytes < tied.total + 64 * 4096


def test_a_streamed_model_is_taken_over(decoder: Decoder) -> None:
    model: Any = nb.stream_pretrained(decoder.folder, budget="100MB", max_tokens=16)
    model.train()
    model, optimizer = with_lora(model)
    with TrainingWeights.of(model, None, decoder.total // 4) as weights:
        assert nb.session(model).closed
        assert steps_agree(decoder, model, weights, optimizer, 2)


def test_a_model_given_in_memory_lets_its_frozen_weights_go(decoder: Decoder) -> None:
    model, optimizer = with_lora(decoder.in_memory())
    parameters = list(model.parameters())
    weights = decoder.on_storage(model)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert all(is_standin(p) != p.requires_grad for p in model.parameters())
    assert steps_agree(decoder, model, weights, optimizer)


def test_the_last_layer_of_a_skeleton_is_loaded_and_trained(decoder: Decoder) -> None:
    model, plain = decoder.skeleton(), decoder.in_memory()
    for each in (model, plain):
        each.requires_grad_(False)
        each.lm_head.requires_grad_(True)
    weights = decoder.on_storage(model)
    assert weights.loaded_bytes == plain.lm_head.weight.nbytes
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    for each in (model, plain):
        decoder.loss(each).backward()
    assert gradients_equal(model, plain)


def test_recomputed_layers_touch_their_weights_again(decoder: Decoder) -> None:
    model, optimizer = with_lora(decoder.skeleton())
    model.activation_checkpointing_enable({"use_reentrant": False})
    weights = decoder.on_storage(model)
    weights.window.poison = True
    assert steps_agree(decoder, model, weights, optimizer, 2)


def test_evaluation_between_steps_gives_the_same_answer(decoder: Decoder) -> None:
    model, _ = with_lora(decoder.skeleton())
    decoder.on_storage(model)
    plain, _ = with_lora(decoder.in_memory())
    model.eval()
    plain.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(decoder.loss(model), decoder.loss(plain))


def test_a_step_unlike_the_one_before_is_as_right(decoder: Decoder) -> None:
    model, optimizer = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model)
    weights.begin_step()
    for layer in reversed(model.model.layers):  # another order than any step will have
        layer.mlp(torch.zeros(1, 1, 96))
    weights.end_step()
    assert steps_agree(decoder, model, weights, optimizer, 1)
    assert weights.window.order.departures > 0


def test_autocast_gives_the_bits_of_memory(decoder: Decoder) -> None:
    model, plain = with_lora(decoder.skeleton())[0], with_lora(decoder.in_memory())[0]
    weights = decoder.on_storage(model)
    weights.window.poison = True
    for each in (model, plain):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = decoder.loss(each)
        loss.backward()
    assert gradients_equal(model, plain)
