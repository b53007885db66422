"""``narrowboat train`` and ``narrowboat plan --train``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

MODELS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    def forward(self, x):
        return x + self.branch(x)

def net():
    blocks = [Block(16) for _ in range(4)]
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), *blocks, nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )

net.example_inputs = lambda: (torch.zeros(1, 1, 8, 8),)

def slow():
    return nn.Sequential(nn.Flatten(), Slow(), nn.Linear(64, 10))

slow.example_inputs = net.example_inputs

class Slow(nn.Module):
    def forward(self, x):
        import time
        time.sleep(0.05)
        return x

def colour():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

colour.example_inputs = lambda: (torch.zeros(1, 3, 16, 16),)

def two():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

two.example_inputs = colour.example_inputs

def bytes_():
    return nn.Sequential(nn.Embedding(256, 16), nn.Linear(16, 256))

def small_vocabulary():
    return nn.Sequential(nn.Embedding(90, 16), nn.Linear(16, 90))

def nothing():
    return 5

def normed():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

normed.example_inputs = net.example_inputs

class Picky(nn.Module):
    def forward(self, x):
        if len(x) == 97:
            raise ValueError("not 97")
        return x

def picky():
    return nn.Sequential(nn.Flatten(), Picky(), nn.Linear(64, 10))

picky.example_inputs = net.example_inputs

def failing():
    raise ValueError("not today")
"""
BUDGET = ("--budget", "500MiB")


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``models.py``; one thread, as other tests have it."""
    (tmp_path / "trained_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trained_models", raising=False)
    return tmp_path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes that a network can tell by their colour."""
    from PIL import Image

    folder = tmp_path / "pictures"
    for number, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for shade in range(8):
            colour = [10 * shade] * 3
            colour[2 - number] = 255
            Image.new("RGB", (24, 18), tuple(colour)).save(folder / name / f"{shade}.png")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


def test_digits_are_learned_and_the_report_has_prediction_beside_measurement(narrowboat: Any) -> None:
    finished = narrowboat(
        "train", "trained_models:net", "--data", "digits", *BUDGET, "--batch", 64, "--lr", "5e-3", "--json"
    )
    assert finished.code == 0, finished.err
    report = finished.json()
    assert report["learned"] == "classes of images"
    assert report["samples"] + report["validation_samples"] == 1797
    assert report["validation_samples"] == 180
    assert report["steps"] == report["planned_steps"] == 26  # 25 of 64 and one of 17
    assert report["last_loss"] < report["first_loss"]
    assert report["scores"][-1]["step"] == 26
    assert report["scores"][-1]["accuracy"] > 0.5
    assert 0 < report["predicted_peak_bytes"] <= report["budget_bytes"] == 500 << 20
    assert report["measured_peak_bytes"] > 0
    assert report["samples_per_s"] > 0
    assert report["predicted_slowdown"] == pytest.approx(1.0)
    assert report["stopped"] is False
    assert report["wrote"] == []


def test_an_image_folder_is_learned_and_the_weights_run(narrowboat: Any, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    finished = narrowboat(
        *("train", "trained_models:colour", "--data", pictures, *BUDGET, "--batch", 8, "--epochs", 6),
        *("--lr", "3e-2", "--clip", 1.0, "--optimizer", "sgd", "--out", out, "--val", 0.25),
    )
    assert finished.code == 0, finished.err
    for words in ("classes of images, from 18 samples; 6 kept back", "18 of 18", "peak memory", "validation loss"):
        assert words in finished.out
    assert "plan:" in finished.err
    ran = narrowboat("run", "trained_models:colour", "--weights", out, *BUDGET, "--passes", 1, "--json")
    assert ran.code == 0, ran.err
    from safetensors.torch import load_file

    assert set(load_file(out)) >= {"0.weight", "4.bias"}


def test_a_run_that_is_gone_on_with_ends_as_if_it_had_not_ended(narrowboat: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    common = ("train", "trained_models:net", "--data", "digits", *BUDGET, "--batch", 32, "--seed", 3, "--val", 0)
    whole, half, rest = (tmp_path / f"{name}.safetensors" for name in ("whole", "half", "rest"))
    assert narrowboat(*common, "--steps", 4, "--out", whole).code == 0
    assert narrowboat(*common, "--steps", 2, "--out", half).code == 0
    state = tmp_path / "half.safetensors.state"
    finished = narrowboat(*common, "--steps", 4, "--out", rest, "--resume", state, "--json")
    assert finished.code == 0, finished.err
    assert finished.json()["steps"] == 4
    wanted, found = load_file(whole), load_file(rest)
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    first = load_file(half)
    assert not torch.equal(wanted["0.weight"], first["0.weight"])

    again = narrowboat(*common, "--steps", 2, "--resume", state)
    assert (again.code, "made already" in again.err) == (2, True)
    other = narrowboat(*common, "--steps", 4, "--optimizer", "sgd", "--resume", state)
    assert (other.code, "optimizer adamw" in other.err) == (2, True)
    wrong = narrowboat("train", "trained_models:slow", *common[2:], "--steps", 4, "--resume", state)
    assert (wrong.code, "another model" in wrong.err) == (1, True)
    for path, code in ((whole, 1), (tmp_path / "none", 1)):
        assert narrowboat(*common, "--resume", path).code == code


def test_a_llama_folder_learns_a_text_with_its_tokenizer(narrowboat: Any, text: Path, tmp_path: Path) -> None:
    from pretrained_kit import llama, tokenizer

    folder = tmp_path / "llama"
    llama(folder, num_hidden_layers=1)
    tokenizer(folder)
    finished = narrowboat(
        *("train", folder, "--data", text, *BUDGET, "--batch", 4, "--length", 16, "--epochs", 2, "--json"),
        *("--out", tmp_path / "out.safetensors"),
    )
    assert finished.code == 0, finished.err
    report = finished.json()
    assert report["learned"] == "next tokens"
    assert report["last_loss"] < report["first_loss"]
    assert [score["step"] for score in report["scores"]] == [report["steps"] // 2, report["steps"]]
    once_more = narrowboat(
        *("train", folder, "--weights", tmp_path / "out.safetensors", "--data", text, *BUDGET, "--json"),
        *("--batch", 4, "--length", 16, "--steps", 1),
    )
    assert once_more.code == 0, once_more.err
    assert once_more.json()["first_loss"] < report["first_loss"]


def test_a_text_classifier_learns_labelled_lines(narrowboat: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=256,
        num_labels=2,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    lines = tmp_path / "lines.tsv"
    lines.write_text("".join(f"good\tyes {i}\nbad\tno no {i}\n" for i in range(20)))
    common = ("train", tmp_path / "classifier", *BUDGET, "--length", 12, "--batch", 8, "--lr", "1e-2", "--json")
    finished = narrowboat(*common, "--data", lines, "--epochs", 4, "--val", 0.2)
    assert finished.code == 0, finished.err
    assert finished.json()["learned"] == "classes of texts"
    assert finished.json()["last_loss"] < finished.json()["first_loss"]
    lines.write_text("".join(f"{label}\ttext\n" for label in "abc"))
    more = narrowboat(*common, "--data", lines)
    assert (more.code, "has 3 classes, and the model tells 2 apart" in more.err) == (2, True)


def test_a_model_without_a_tokenizer_learns_bytes(narrowboat: Any, text: Path) -> None:
    common = ("--data", text, *BUDGET, "--length", 32, "--batch", 8, "--steps", 3)
    finished = narrowboat("train", "trained_models:bytes_", *common, "--json")
    assert finished.code == 0, finished.err
    assert finished.json()["steps"] == 3
    small = narrowboat("train", "trained_models:small_vocabulary", *common)
    assert (small.code, "has 256 tokens, and the model tells 90 apart" in small.err) == (2, True)


# One process imports torch, and forks a child for each signal.
SIGNALLED = """
import os, sys
from narrowboat.cli import train_live
from narrowboat.cli.main import main
from narrowboat.train.recipes import loop

train_live._EVERY = 0.0
plain = loop.load

# Said before each step, so that the signal comes while it trains.
def load(*a):
    print('batch', os.getpid(), file=sys.stderr, flush=True)
    return plain(*a)

loop.load = load
arguments = ["train", "trained_models:slow", "--data", "digits", "--budget", "500MiB", "--steps", "100000", "--json"]
for out in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.stdout = open(f"{out}.json", "w")
        main([*arguments, "--out", out])
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""


def test_a_signal_ends_it_after_the_step_and_what_was_trained_is_saved(tmp_path: Path) -> None:
    outs = {signal.SIGINT: tmp_path / "int.safetensors", signal.SIGTERM: tmp_path / "term.safetensors"}
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, *map(str, outs.values())], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stderr is not None
    said = iter(process.stderr.readline, "")
    child = 0
    try:
        for signalled, out in outs.items():
            told: list[str] = []
            for _ in range(3):
                told = next(said).split()
                assert told[0] == "batch"
            child = int(told[1])
            os.kill(child, signalled)
            rest = list(iter(lambda: next(said).strip(), "ended 130"))
            assert len(rest) < 1000, "it ends after the step"
            report = json.loads(Path(f"{out}.json").read_text())
            assert report["stopped"] is True
            assert 2 <= report["steps"] < 100000
            state = torch.load(f"{out}.state", weights_only=True)
            assert state["steps"] == report["steps"]
            assert out.is_file()
            assert not list(tmp_path.glob(".*packing"))
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        if child:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_an_image_that_cannot_be_read_ends_it_with_its_name_and_what_was_trained(
    narrowboat: Any, pictures: Path, tmp_path: Path
) -> None:
    bad = pictures / "red" / "7.png"
    bad.write_bytes(bad.read_bytes()[:45])  # begins as an image does
    out = tmp_path / "out.safetensors"
    finished = narrowboat(
        *("train", "trained_models:colour", "--data", pictures, *BUDGET, "--batch", 2, "--val", 0, "--out", out),
        *("--seed", 1),
    )
    assert finished.code == 2
    assert "7.png is no image that can be read" in finished.err
    assert f"saved as it was after step {torch.load(f'{out}.state', weights_only=True)['steps']}" in finished.err


def test_a_file_that_is_no_image_is_named_before_any_training(narrowboat: Any, pictures: Path) -> None:
    (pictures / "red" / "7.png").write_bytes(b"no image")
    finished = narrowboat("train", "trained_models:colour", "--data", pictures, *BUDGET, "--batch", 2)
    assert finished.code == 2
    assert "7.png is no image that can be read" in finished.err and "step" not in finished.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("trained_models:net", "--data", "nowhere"), 2, "there is no nowhere"),
        (("trained_models:net", "--data", "empty"), 2, "0 subfolders"),
        (("trained_models:net", "--data", "digits", "--budget", "1MiB"), 1, "needs"),
        (("trained_models:net", "--data", "digits", "--budget", "some"), 2, "not a byte size"),
        (("trained_models:net", "--data", "digits", "--optimizer", "adam"), 2, "adamw"),
        (("trained_models:net", "--data", "digits", "--batch-norm", "none"), 2, "lockstep"),
        (("trained_models:net", "--data", "digits", "--techniques", "magic"), 2, "magic"),
        (("trained_models:net", "--data", "digits", "--lr", "0"), 2, "--lr must be more than zero"),
        (("trained_models:net", "--data", "digits", "--lr", "nan"), 2, "--lr"),
        (("trained_models:net", "--data", "digits", "--clip", "-1"), 2, "--clip"),
        (("trained_models:net", "--data", "digits", "--epochs", "1", "--steps", "1"), 2, "not both"),
        (("trained_models:net", "--data", "digits", "--weights", "nowhere"), 1, "nowhere"),
        (("trained_models:net", "--data", "digits", "--out", "no/where.safetensors"), 2, "there is no folder"),
        (("trained_models:net", "--data", "digits", "--out", "empty"), 2, "is a folder"),
        (("trained_models:net", "--data", "digits", "--out", "x.pt"), 2, "PyTorch file"),
        (("trained_models:bytes_", "--data", "short.txt", "--out", "short.txt"), 2, "short.txt is not named so"),
        (("trained_models:net", "--data", "digits", "--length", "3"), 2, "--length"),
        (("trained_models:two", "--data", "digits"), 2, "has 10 classes, and the model tells 2 apart"),
        (("trained_models:net", "--data", "empty.txt"), 2, "takes images"),
        (("trained_models:bytes_", "--data", "empty.txt"), 2, "is empty"),
        (("trained_models:bytes_", "--data", "short.txt"), 2, "fewer than one block"),
        (("trained_models:nothing", "--data", "digits"), 1, "not an nn.Module"),
        (("trained_models:none", "--data", "digits"), 2, "has no 'none'"),
        (("trained_models:failing", "--data", "digits"), 1, "factory trained_models:failing failed: ValueError: not"),
        (("json:loads", "--data", "digits"), 2, "json:loads is no model factory"),
        (("trained_models:normed", "--data", "digits", "--batch", "1"), 1, "give a larger batch"),
        (("trained_models:net",), 2, "--data"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_an_exit_code(
    narrowboat: Any, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    finished = narrowboat("train", *(() if "--budget" in arguments else BUDGET), *arguments, "--steps", 1)
    assert (finished.code, said in finished.err) == (code, True), finished.err
    assert "Traceback" not in finished.err
    assert not list(tmp_path.glob("*.state"))


def test_a_refused_budget_has_its_minimum_and_that_is_enough(narrowboat: Any) -> None:
    common = ("train", "trained_models:net", "--data", "digits", "--batch", 64, "--steps", 2, "--val", 0, "--json")
    refused = narrowboat(*common, "--budget", "1MiB")
    assert refused.code == 1
    error = refused.json()["error"]
    assert error["type"] == "BudgetError"
    accepted = narrowboat(*common, "--budget", error["minimum"])
    assert accepted.code == 0, accepted.err
    plan = accepted.json()["plan"]
    assert plan["predicted_peak_bytes"] <= error["minimum"] < plan["plain_peak_bytes"]


def test_a_curve_that_could_not_be_written_is_refused_before_planning(narrowboat: Any, tmp_path: Path) -> None:
    finished = narrowboat("plan", "--train", "trained_models:net", *BUDGET, "--curve", tmp_path / "no" / "c.png")
    assert finished.code == 2 and "there is no folder" in finished.err
    finished = narrowboat("plan", "trained_models:net", "--curve", tmp_path)
    assert finished.code == 2 and "is a folder" in finished.err


def test_a_training_plan_has_its_classes_of_bytes_and_a_curve(narrowboat: Any, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    common = ("plan", "--train", "trained_models:net", "--batch", 128, *BUDGET)
    finished = narrowboat(*common, "--curve", picture, "--json")
    assert finished.code == 0, finished.err
    plan = finished.json()
    assert plan["batch"] == 128
    weights = sum(p.numel() * 4 for p in _net().parameters())
    assert plan["bytes"]["weights"] == weights
    # At the worst moment, early in the backward pass, not all gradients are there.
    assert 0 <= plan["bytes"]["gradients"] <= weights
    assert plan["bytes"]["optimizer"] >= 2 * weights
    assert plan["micro_batches"] == 1
    assert "takes its statistics from the whole batch" in plan["refused"][0]
    budgets, times = ([point[name] for point in plan["curve"]] for name in ("budget", "slowdown"))
    assert len(budgets) > 2
    assert budgets == sorted(budgets)
    assert times == sorted(times, reverse=True)
    assert budgets[0] == plan["min_budget_bytes"]
    assert all(point["predicted_peak"] <= point["budget"] for point in plan["curve"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = narrowboat(*common)
    for words in ("smallest budget", "gradients", "units", "Time against memory", "1.00x"):
        assert words in told.out


@pytest.mark.parametrize(
    ("model", "batch", "code", "said"),
    [("json:loads", 8, 2, "is no model factory"), ("trained_models:normed", 1, 1, "give a larger batch")],
)
def test_what_cannot_be_planned_is_one_line_too(narrowboat: Any, model: str, batch: int, code: int, said: str) -> None:
    finished = narrowboat("plan", "--train", model, "--batch", batch, *BUDGET)
    assert (finished.code, said in finished.err, finished.err.count("\n")) == (code, True, 1), finished.err


def test_a_batch_that_the_model_cannot_take_ends_it_with_what_was_trained(narrowboat: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    finished = narrowboat(  # of 1797 samples the second batch has 97
        *("train", "trained_models:picky", "--data", "digits", *BUDGET, "--batch", 1700, "--val", 0, "--out", out)
    )
    assert finished.code == 1
    assert "the model (or loss) fails on this batch: ValueError: not 97" in finished.err
    assert "saved as it was after step 1" in finished.err


def _net() -> Any:
    import importlib

    return importlib.import_module("trained_models").net()


def test_options_of_the_other_kind_of_plan_are_refused(narrowboat: Any) -> None:
    for arguments, said in (
        (("--train", "--bandwidth", "1GB"), "--bandwidth does nothing with --train"),
        (("--batch", "4"), "give --train with it"),
        (("--batch-norm", "ghost"), "--batch-norm"),
    ):
        finished = narrowboat("plan", "trained_models:net", *BUDGET, *arguments)
        assert (finished.code, said in finished.err) == (2, True), finished.err


def test_help_names_what_there_is(narrowboat: Any) -> None:
    helped = narrowboat("train", "--help")
    assert helped.code == 0
    for words in ("--budget", "--resume", "digits", "label", "lockstep", "Ctrl-C"):
        assert words in helped.out
    assert "--train" in narrowboat("plan", "--help").out


def test_the_command_knows_the_choices_of_the_step() -> None:
    from narrowboat.cli.options import BatchNorm, Optimizer, TechniquesOption
    from narrowboat.report.trainee import OPTIMIZERS
    from narrowboat.train.options import BATCH_NORM
    from narrowboat.train.switches import Switches

    assert {each.value for each in BatchNorm} == set(BATCH_NORM)
    assert {each.value for each in Optimizer} == set(OPTIMIZERS)
    assert all(name in TechniquesOption.__metadata__[0].help for name in Switches.NAMES)
