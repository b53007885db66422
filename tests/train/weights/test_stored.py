"""Full fine-tuning with weights, gradients and optimizer state on storage: plain training's bits, and whole steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from narrowboat.arena.standin import is_standin
from narrowboat.errors import SpillError
from narrowboat.train.state.gradients import GradientStore
from narrowboat.train.state.optimizer import StoredOptimizer
from narrowboat.train.weights import TrainingWeights
from train_weights_kit import Decoder, Layers, in_memory_steps, stored_step

BUCKET = 40_000  # bytes of state


class Run:
    """A model all of whose weights, and its optimizer's state, are on storage."""

    def __init__(self, decoder: Decoder, folder: Path, *, budget: int = 0, **options: Any) -> None:
        self.decoder = decoder
        self.model = decoder.skeleton()
        self.weights = decoder.on_storage(self.model, budget=budget, store=folder, **options)
        assert self.weights.stored is not None
        self.stored = self.weights.stored
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}
        self.stored.take_gradients(self.gradients.__setitem__)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.optimizer = StoredOptimizer(optimizer, folder, bucket_bytes=BUCKET, resume=options.get("resume", False))

    def step(self) -> torch.Tensor:
        return stored_step(self.decoder, self.model, self.weights, self.optimizer, self.gradients)

    def equals(self, plain: nn.Module) -> bool:
        pairs = zip(self.model.parameters(), plain.parameters(), strict=True)
        return all(torch.equal(one.clone(), other) for one, other in pairs)


@pytest.mark.parametrize("poison", [False, True])
def test_three_steps_have_the_bits_of_training_in_memory(decoder: Decoder, tmp_path: Path, poison: bool) -> None:
    run = Run(decoder, tmp_path)
    run.weights.window.poison = poison
    plain, losses = in_memory_steps(decoder, 3)
    assert all(torch.equal(run.step(), loss) for loss in losses)
    assert run.equals(plain)
    assert run.weights.window.escaped_bytes == 0
    assert run.weights.peak_bytes <= run.weights.window.held_bytes <= decoder.total // 4
    assert all(is_standin(p) and p.grad is None for p in run.model.parameters())


def test_tied_embeddings_are_stepped_once(tied: Decoder, tmp_path: Path) -> None:
    run = Run(tied, tmp_path, budget=tied.total // 3)
    plain, losses = in_memory_steps(tied, 2)
    assert all(torch.equal(run.step(), loss) for loss in losses)
    assert run.equals(plain)


def test_the_optimizer_s_part_is_read_ahead_too(decoder: Decoder, tmp_path: Path) -> None:
    run = Run(decoder, tmp_path)
    run.step()
    demanded = run.weights.window.demanded
    run.step()
    assert run.weights.window.demanded == demanded


def test_what_is_saved_is_the_model(tied: Decoder, tmp_path: Path) -> None:
    run = Run(tied, tmp_path, budget=tied.total // 3)
    plain, losses = in_memory_steps(tied, 1)
    assert torch.equal(run.step(), losses[0])
    run.weights.save(tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    wanted = plain.state_dict()
    assert saved.keys() == wanted.keys() - {"lm_head.weight"}
    assert all(torch.equal(saved[name], wanted[name]) for name in saved)


def test_a_step_that_fails_in_the_middle_can_be_discarded(decoder: Decoder, tmp_path: Path) -> None:
    run = Run(decoder, tmp_path)
    plain, losses = in_memory_steps(decoder, 1)
    assert torch.equal(run.step(), losses[0])
    parameters = list(run.model.parameters())
    with run.stored.tensors(parameters[:2]), torch.no_grad():
        parameters[0].add_(1.0)
    assert not torch.equal(parameters[0].clone(), plain.model.embed_tokens.weight)
    with pytest.raises(ZeroDivisionError), run.stored.tensors(parameters[2:4]), torch.no_grad():
        parameters[2].add_(1.0)
        raise ZeroDivisionError
    run.stored.discard()
    assert all(is_standin(p) for p in parameters)
    assert run.equals(plain)


def test_a_full_disk_is_told_and_the_last_step_still_counts(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(decoder, tmp_path)
    plain, losses = in_memory_steps(decoder, 1)
    assert torch.equal(run.step(), losses[0])

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    parameters = list(run.model.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with run.stored.tensors(parameters[:3]), torch.no_grad():
            parameters[0].add_(1.0)
        with pytest.raises(SpillError, match="space"):
            run.stored.commit(2)
    run.stored.discard()
    assert run.equals(plain)


def test_a_graph_from_before_a_step_cannot_be_gone_through_after_it(decoder: Decoder, tmp_path: Path) -> None:
    run = Run(decoder, tmp_path)
    weight = run.model.lm_head.weight
    x = torch.ones(1, 96, requires_grad=True)
    kept = nn.functional.linear(x, weight).sum()
    with run.stored.tensors([weight]):
        assert type(weight) is nn.Parameter
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as in memory
        kept.backward()


KILLED = """
import os, signal, sys
from contextlib import closing
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from test_stored import Layers, Run
run = Run(Layers(Path(sys.argv[1])), Path(sys.argv[2]))
run.step()
step_bucket, stepped = run.optimizer.step_bucket, []

def until_killed(index):
    if stepped:
        os.kill(os.getpid(), signal.SIGKILL)
    stepped.append(index)
    step_bucket(index)

run.optimizer.step_bucket = until_killed
run.step()
"""


def test_a_killed_run_goes_on_from_its_last_whole_step(tmp_path: Path) -> None:
    layers, store = Layers(tmp_path), tmp_path / "store"
    here = Path(__file__).parent
    arguments = [str(tmp_path), str(store), str(here), str(here.parents[1])]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    run = Run(layers, store, resume=True)
    assert run.stored.records.step == 1
    plain, losses = in_memory_steps(layers, 3)
    assert [torch.equal(run.step(), loss) for loss in losses[1:]] == [True, True]
    assert run.equals(plain)
    run.weights.close()


def test_weights_gradients_and_optimizer_state_are_all_on_storage(decoder: Decoder, tmp_path: Path) -> None:
    model = decoder.skeleton()
    weights = decoder.on_storage(model, store=tmp_path)
    optimizer = StoredOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), tmp_path, bucket_bytes=BUCKET)
    assert weights.bytes_read == 0, "its state is foreseen from shapes alone"
    stored = weights.stored
    assert stored is not None
    plain, losses = in_memory_steps(decoder, 2)
    made = GradientStore(stored.parameters, tmp_path, bucket_bytes=BUCKET, buckets=optimizer.buckets)
    with closing(made) as gradients:
        for step, want in enumerate(losses):
            weights.begin_step()
            gradients.attach()
            loss = decoder.loss(model)
            loss.backward()
            assert torch.equal(loss, want)
            del loss
            optimizer.begin()
            for index, bucket in enumerate(optimizer.buckets):
                with stored.tensors(bucket):
                    record = gradients.read(index)
                    optimizer.step_bucket(index)
                    gradients.release(index, record)
            optimizer.finish(commit=False)
            stored.commit(step + 1)
            optimizer.commit()
            weights.end_step()
            assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p.clone(), q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_frozen_weights_and_trained_ones_share_the_window(decoder: Decoder, tmp_path: Path) -> None:
    def freeze(model: Any) -> Any:
        model.requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
        return model

    model, plain = freeze(decoder.skeleton()), freeze(decoder.in_memory())
    weights = decoder.on_storage(model, store=tmp_path)
    assert weights.stored is not None
    weights.window.poison = True
    taken: dict[nn.Parameter, torch.Tensor] = {}
    weights.stored.take_gradients(taken.__setitem__)
    decoder.loss(model).backward()
    decoder.loss(plain).backward()
    wanted = [p for p in plain.parameters() if p.requires_grad]
    assert len(weights.stored.parameters) == len(wanted) == len(taken)
    assert all(torch.equal(taken[p], q.grad) for p, q in zip(weights.stored.parameters, wanted, strict=True))


def test_temporary_records_leave_nothing_behind(decoder: Decoder, tmp_path: Path) -> None:
    model = decoder.skeleton()
    with TrainingWeights.of(model, decoder.folder, decoder.total // 4, store=tmp_path, temporary=True) as weights:
        assert weights.stored is not None
        with weights.stored.tensors([model.lm_head.weight]), torch.no_grad():
            model.lm_head.weight.zero_()
        weights.stored.commit(1)
        assert not model.lm_head.weight.any()
    assert list(tmp_path.iterdir()) == []
