"""``narrowboat generate``, and model folders as MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")


from pretrained_kit import llama, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(tmp_path / "model", eos_token_id=None)
    tokenizer(tmp_path / "model")
    return tmp_path / "model"


ON_DEVICE = ("--device", "emulated:64MiB:2GB", "--host-budget", "8MiB")


@pytest.mark.parametrize("where", [(), ON_DEVICE], ids=["processor", "device"])
def test_text_and_its_cost_are_those_of_plain_transformers(
    narrowboat: Any, folder: Path, where: tuple[str, ...]
) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    given = ("--prompt", "the quick", "--budget", "40MiB", "--new-tokens", "9", "--json", *where)
    finished = narrowboat("generate", folder, *given)
    assert finished.code == 0, finished.err
    told = finished.json()
    words, plain = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder).eval()
    ids = words("the quick", return_tensors="pt")["input_ids"]
    want = plain.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :].tolist()
    assert told["token_ids"] == want
    assert told["text"] == words.decode(want, skip_special_tokens=True)
    assert told["prompt_tokens"] == ids.shape[1]
    assert told["tokens_per_s"] > 0
    assert told["peak_bytes"] <= told["budget_bytes"]
    assert told["min_budget_bytes"] < told["budget_bytes"] == 40 << 20


def test_text_is_printed_and_then_what_it_took(narrowboat: Any, folder: Path) -> None:
    finished = narrowboat("generate", folder, "--prompt", "the", "--budget", "40MiB", "--new-tokens", "5")
    assert finished.code == 0, finished.err
    assert "read per token" in finished.out
    assert "storage allows" in finished.out


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--budget", "1MiB"], 1, "smallest that can"),
        (["--budget", "12 apples"], 2, "12 apples"),
        (["--budget", "1GiB", "--max-tokens", "3"], 1, "too few"),
        (["--budget", "1GiB", "--new-tokens", "0"], 2, "new-tokens"),
    ],
)
def test_what_cannot_be_is_told(narrowboat: Any, folder: Path, more: list[str], code: int, says: str) -> None:
    finished = narrowboat("generate", folder, "--prompt", "the", *more)
    assert finished.code == code
    assert says in finished.err


def test_a_folder_without_a_tokenizer_is_refused(narrowboat: Any, tmp_path: Path) -> None:
    llama(tmp_path / "model")
    finished = narrowboat("generate", tmp_path / "model", "--prompt", "the", "--budget", "1GiB")
    assert finished.code == 1
    assert "no tokenizer" in finished.err


def test_run_and_plan_take_a_folder(narrowboat: Any, folder: Path) -> None:
    ran = narrowboat("run", folder, "--budget", "40MiB", "--verify", "--passes", "2", "--json")
    assert ran.code == 0, ran.err
    assert ran.json()["bit_identical"] is True
    planned = narrowboat("plan", folder, "--budget", "40MiB", "--json")
    assert planned.code == 0, planned.err
    assert planned.json()["blocks"] > 0
