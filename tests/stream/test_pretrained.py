"""``nb.stream_pretrained``: ``generate`` gives plain tokens, and the cache keeps within its reservation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import narrowboat as nb
from narrowboat.errors import ModelError, ReservationError, UsageError
from narrowboat.stream.pretrained import tokens_needed
from pretrained_kit import llama, t5

IDS = torch.tensor([[5, 17, 3, 99, 250, 8]])


def smallest(folder: Path, tokens: int) -> int:
    with pytest.raises(nb.BudgetError) as caught:
        nb.stream_pretrained(folder, budget=1, max_tokens=tokens)
    return caught.value.minimum


@pytest.fixture
def folder(tmp_path: Path, tiny_blocks: None) -> Path:
    return tmp_path / "model"


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda how: ",".join(how),
)
def test_generate_gives_the_tokens_of_plain_transformers(folder: Path, how: dict[str, Any]) -> None:
    plain = llama(folder, shard="300KB", dtype=torch.bfloat16)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = nb.stream_pretrained(folder, budget=smallest(folder, 64), max_tokens=64)
    assert type(model) is type(plain)
    with nb.session(model) as session:
        assert session.plan.streamed
        torch.manual_seed(1)
        want = plain.generate(IDS, max_new_tokens=12, **how)
        torch.manual_seed(1)
        assert torch.equal(model.generate(IDS, max_new_tokens=12, **how), want)


def test_assisted_decoding_with_a_second_streamed_model(folder: Path, tmp_path: Path) -> None:
    plain = llama(folder)
    llama(tmp_path / "small", num_hidden_layers=1, hidden_size=64)
    model = nb.stream_pretrained(folder, budget=smallest(folder, 64), max_tokens=64)
    helper = nb.stream_pretrained(tmp_path / "small", budget="30MiB", max_tokens=64)
    with nb.session(model), nb.session(helper):
        want = plain.generate(IDS, max_new_tokens=10, do_sample=False)
        assert torch.equal(model.generate(IDS, max_new_tokens=10, do_sample=False, assistant_model=helper), want)


def test_an_encoder_decoder_generates(folder: Path) -> None:
    plain = t5(folder)
    model = nb.stream_pretrained(folder, budget=smallest(folder, 32), max_tokens=32)
    with nb.session(model):
        want = plain.generate(IDS, max_new_tokens=9, num_beams=2)
        assert torch.equal(model.generate(IDS, max_new_tokens=9, num_beams=2), want)


def test_what_cross_attention_keeps_counts_for_every_beam(folder: Path) -> None:
    plain = t5(folder)
    model = nb.stream_pretrained(folder, budget=smallest(folder, 32), max_tokens=32)
    with nb.session(model) as session:
        with pytest.raises(ReservationError, match="40 tokens, and 32 are reserved"):
            model.generate(torch.ones(1, 40, dtype=torch.long), max_new_tokens=2)
        assert session.stats()["passes"] == 0
        with pytest.raises(ReservationError, match="60 tokens, and 32 are reserved"):
            model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=2, num_beams=3)
        want = plain.generate(IDS, max_new_tokens=5)
        assert torch.equal(model.generate(IDS, max_new_tokens=5), want)


def test_the_cache_has_its_line_in_the_plan(folder: Path) -> None:
    llama(folder)
    model = nb.stream_pretrained(folder, budget="40MiB", max_tokens=100)
    with nb.session(model) as session:
        # layers x (keys and values) x heads x head size x 4 bytes x tokens
        assert session.stats()["fixed_parts"]["kv-cache"] == 4 * 2 * 2 * 24 * 4 * 100
        assert "kv-cache" in str(session.plan)


def test_a_prompt_beyond_the_reservation_is_refused_before_it_runs(folder: Path) -> None:
    llama(folder)
    model = nb.stream_pretrained(folder, budget="40MiB", max_tokens=10)
    with nb.session(model) as session:
        with pytest.raises(ReservationError, match="12 tokens, and 10 are reserved"):
            model.generate(torch.ones(2, 6, dtype=torch.long), max_new_tokens=2)
        assert session.stats()["passes"] == 0
        assert model.generate(IDS, max_new_tokens=2).shape[1] <= 8


def test_growth_past_the_reservation_is_refused_and_the_session_goes_on(folder: Path) -> None:
    plain = llama(folder, eos_token_id=None)
    model = nb.stream_pretrained(folder, budget="40MiB", max_tokens=9)
    with nb.session(model):
        with pytest.raises(ReservationError, match="max_tokens=10"):
            model.generate(IDS, max_new_tokens=20, do_sample=False)
        want = plain.generate(IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), want)


def test_a_static_cache_counts_at_once(folder: Path) -> None:
    llama(folder)
    model = nb.stream_pretrained(folder, budget="40MiB", max_tokens=20)
    with nb.session(model), pytest.raises(ReservationError):
        model.generate(IDS, max_new_tokens=40, cache_implementation="static")


def test_tokens_are_counted_over_all_sequences() -> None:
    ids = torch.ones(3, 7, dtype=torch.long)
    assert tokens_needed({"input_ids": ids}) == 21
    assert tokens_needed({"inputs_embeds": torch.ones(2, 5, 8)}) == 10
    assert tokens_needed({"input_ids": ids, "decoder_input_ids": torch.ones(3, 9)}) == 27
    assert tokens_needed({"encoder_outputs": (torch.ones(4, 9, 8),), "decoder_input_ids": torch.ones(4, 2)}) == 36
    assert tokens_needed({}) == 0


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True])
def test_a_reservation_has_to_be_a_number_of_tokens(tmp_path: Path, tokens: Any) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        nb.stream_pretrained(tmp_path, budget="1GiB", max_tokens=tokens)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        nb.stream_pretrained(tmp_path, budget="1GiB")


_CHILD = """
import sys, torch, narrowboat as nb
torch.set_num_threads(1)
model = nb.stream_pretrained(sys.argv[1], budget=int(sys.argv[2]), max_tokens=300)
session = nb.session(model)
with torch.inference_mode():
    out = model.generate(torch.ones(1, 100, dtype=torch.long), max_new_tokens=200, min_new_tokens=200, do_sample=False)
assert out.shape == (1, 300), out.shape
stats = session.stats()
print(stats["peak_bytes"], stats["fixed_parts"]["kv-cache"])
"""


def test_a_cache_grown_to_its_reservation_stays_within_the_budget(folder: Path) -> None:
    llama(folder, hidden_size=256, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024)
    budget = smallest(folder, 300) + (2 << 20)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), str(budget)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GOMP_SPINCOUNT": "1000"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak, cache = map(int, done.stdout.split()[-2:])
    assert cache == 4 * 2 * 256 * 4 * 300
    assert peak <= budget + (1 << 20)


def test_a_token_table_is_not_held_where_the_model_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.stream.tiling._WORTH_ROWS", 1 << 10)
    plain = llama(folder, vocab_size=4000)
    want = plain.generate(IDS, max_new_tokens=12, do_sample=False)
    enough = 1 << 30
    model = nb.stream_pretrained(folder, budget=enough, max_tokens=64)
    with nb.session(model) as session:
        assert not session.plan.tiled  # it fits: nothing is read per token
    model = nb.stream_pretrained(folder, budget=smallest(folder, 64) + (4 << 20), max_tokens=64)
    with nb.session(model) as session:
        assert dict(session.plan.tiled) == {"model.embed_tokens": 0}
        assert dict(session.plan.fixed_parts)["kv-cache"] > 0
        assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), want)


def test_a_tied_table_stays_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.stream.tiling._WORTH_ROWS", 1 << 10)
    llama(folder, vocab_size=4000, tie_word_embeddings=True)
    model = nb.stream_pretrained(folder, budget=smallest(folder, 64) + (4 << 20), max_tokens=64)
    with nb.session(model) as session:
        assert not session.plan.tiled
