"""Budgets, files and the end: what is refused, what is noticed, what stays usable."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrowboat as nb
from narrowboat.arena.standin import is_standin
from narrowboat.errors import (
    BudgetError,
    SessionClosedError,
    StreamedModelError,
    UsageError,
    WeightsChangedError,
    WeightsMismatchError,
)
from narrowboat.profile.pretrained import open_pretrained
from narrowboat.train.weights import TrainingWeights
from train_weights_kit import Decoder, steps_agree, with_lora

# -- budgets ---------------------------------------------------------------------------------------


def test_a_budget_below_one_operator_is_refused_before_anything_is_touched(decoder: Decoder) -> None:
    model, _ = with_lora(decoder.in_memory())
    with pytest.raises(BudgetError) as refused:
        decoder.on_storage(model, budget=1000)
    assert not any(is_standin(p) or p.is_meta for p in model.parameters())
    weights = decoder.on_storage(model, budget=refused.value.minimum)
    assert weights.minimum == refused.value.minimum
    decoder.loss(model).backward()


def test_the_budget_changes_between_steps(decoder: Decoder) -> None:
    model, optimizer = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model, budget=4 * decoder.total)
    assert steps_agree(decoder, model, weights, optimizer, 1)
    whole = weights.bytes_read
    weights.budget = weights.minimum
    assert weights.resident_bytes <= weights.minimum
    for step, budget in enumerate((weights.minimum, decoder.total // 2, weights.minimum, 4 * decoder.total)):
        weights.budget = budget
        weights.begin_step()
        decoder.loss(model).backward()
        weights.end_step()
        assert weights.resident_bytes <= budget, step
    with pytest.raises(BudgetError):
        weights.budget = 1000
    assert weights.budget == 4 * decoder.total
    before = weights.bytes_read
    decoder.loss(model).backward()
    assert weights.bytes_read == before, "all of it is in"
    assert whole <= decoder.total, "and each weight was read once while all of it fitted"


def test_one_operator_over_more_weights_than_fit_says_how_much_it_needs(decoder: Decoder) -> None:
    model, _ = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with pytest.raises(BudgetError) as refused:
        torch._foreach_norm(frozen)
    weights.budget = refused.value.minimum
    norms = torch._foreach_norm(frozen)
    assert all(torch.equal(norm, torch.linalg.vector_norm(p)) for norm, p in zip(norms, frozen, strict=True))


# -- files -----------------------------------------------------------------------------------------


def lone(decoder: Decoder, folder: Path) -> tuple[Any, Path, TrainingWeights]:
    """A model with LoRA whose weights are in a file of its own."""
    path = folder / "own.safetensors"
    nb.pack(decoder.folder, path)
    model, _ = with_lora(decoder.skeleton())
    return model, path, decoder.on_storage(model, path)


def test_a_file_that_is_replaced_is_noticed(decoder: Decoder, tmp_path: Path) -> None:
    model, path, weights = lone(decoder, tmp_path)
    decoder.loss(model).backward()
    nb.pack(decoder.folder, path, overwrite=True)
    with pytest.raises(WeightsChangedError, match="replaced"):
        weights.begin_step()


def test_a_file_cut_short_in_the_middle_of_a_step_is_noticed(decoder: Decoder, tmp_path: Path) -> None:
    model, path, weights = lone(decoder, tmp_path)
    weights.begin_step()
    loss = decoder.loss(model)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(WeightsChangedError):
        loss.backward()
    with pytest.raises(WeightsChangedError):
        weights.begin_step()


def test_a_read_that_fails_once_is_tried_again(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, failed = os.preadv, []

    def once(*args: Any) -> int:
        if not failed:
            failed.append(True)
            raise OSError(5, "Input/output error")
        return preadv(*args)

    model, optimizer = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model)
    monkeypatch.setattr(os, "preadv", once)
    assert steps_agree(decoder, model, weights, optimizer, 1)
    assert failed


def test_an_interruption_leaves_the_window_usable(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model)
    window = weights.window
    submit, calls = window._submit, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        submit(*args, **kwargs)

    monkeypatch.setattr(window, "_submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.loss(model).backward()
    model.zero_grad()
    assert steps_agree(decoder, model, weights, optimizer, 2)


def test_what_the_file_lacks_is_told(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    nb.pack({"model.norm.weight": torch.ones(96)}, path)
    with pytest.raises(WeightsMismatchError, match=r"model\.embed_tokens\.weight is missing"):
        decoder.on_storage(decoder.skeleton(), path)


def test_a_source_is_asked_for(decoder: Decoder) -> None:
    with pytest.raises(UsageError, match="source"):
        TrainingWeights.of(decoder.skeleton(), None, "1MB")


# -- the end ---------------------------------------------------------------------------------------


def test_after_closing_a_weight_that_is_touched_says_so(decoder: Decoder) -> None:
    model, _ = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model)
    loss = decoder.loss(model)
    weights.close()
    weights.close()
    for use in (loss.backward, lambda: decoder.loss(model)):
        with pytest.raises(SessionClosedError, match="closed"):
            use()


def test_a_closed_model_can_be_put_on_storage_again(decoder: Decoder) -> None:
    model, optimizer = with_lora(decoder.skeleton())
    first = decoder.on_storage(model)
    with pytest.raises(UsageError, match="already"):
        decoder.on_storage(model)
    first.close()
    assert steps_agree(decoder, model, decoder.on_storage(model), optimizer, 1)


def test_dismantled_the_model_is_a_skeleton_that_can_be_streamed(decoder: Decoder) -> None:
    model = decoder.skeleton().requires_grad_(False)
    decoder.on_storage(model).dismantle()
    assert all(type(p) is nn.Parameter and p.is_meta for p in model.parameters())
    example = {"input_ids": decoder.ids}
    streamed = nb.stream(model.eval(), decoder.folder, budget="100MB", example=example)
    with torch.inference_mode():
        assert torch.equal(streamed(decoder.ids).logits, decoder.plain(decoder.ids).logits)
    nb.session(streamed).close()


def test_a_view_that_somebody_keeps_has_bytes_of_its_own(decoder: Decoder) -> None:
    model = decoder.skeleton().requires_grad_(False)
    weights = decoder.on_storage(model)
    norm, wanted = model.model.norm.weight, decoder.plain.model.norm.weight
    slot = norm.__dict__["_narrowboat_slot"]
    with weights.window.touching([slot.weight]) as tensor_of:
        kept = tensor_of(slot)[:7]
    weights.window.poison = True
    decoder.loss(model)
    assert torch.equal(kept, wanted[:7])
    assert weights.window.escaped_bytes == norm.nbytes


def test_moving_a_model_to_where_it_is_changes_nothing(decoder: Decoder) -> None:
    model, optimizer = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model)
    model.to("cpu")
    assert steps_agree(decoder, model, weights, optimizer, 1)


def test_writing_a_weight_in_place_is_refused(decoder: Decoder) -> None:
    model = decoder.skeleton().requires_grad_(False)
    decoder.on_storage(model)
    weight = model.lm_head.weight
    for write in (lambda: weight.mul_(2), lambda: weight.t()[0].zero_(), lambda: torch._foreach_add_([weight], 1.0)):
        with pytest.raises(StreamedModelError, match=r"lm_head\.weight.*cannot be written"):
            write()


def test_nothing_of_a_closed_model_stays_in_memory(decoder: Decoder) -> None:
    model, _ = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model)
    decoder.loss(model).backward()
    weights.close()
    gc.collect()
    assert weights.resident_bytes == 0
    with pytest.raises(ValueError, match="released"):
        len(weights.window._slab._view)


def test_a_model_dropped_without_closing_leaves_no_threads(decoder: Decoder) -> None:
    before = set(threading.enumerate())
    model, _ = with_lora(decoder.skeleton())
    index = open_pretrained(decoder.folder).index
    weights: Any = TrainingWeights.of(model, index, decoder.total // 4)
    decoder.loss(model).backward()
    ours = set(threading.enumerate()) - before
    assert ours
    del model, weights
    gc.collect()
    for thread in ours:
        thread.join(5)
    assert not any(thread.is_alive() for thread in ours)


def test_a_forked_child_is_told_and_can_end(decoder: Decoder) -> None:
    model, _ = with_lora(decoder.skeleton())
    weights = decoder.on_storage(model)
    decoder.loss(model)
    child = os.fork()
    if child == 0:
        told = 1
        try:
            decoder.loss(model)
        except SessionClosedError:
            weights.close()
            told = 0
        finally:
            os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    decoder.loss(model).backward()
