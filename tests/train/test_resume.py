"""Going on from what a run left in its folder: from one whole step of weights and state, or with a clear refusal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from narrowboat.errors import BudgetError, NarrowboatError, SpillError, TrainingError, UsageError
from narrowboat.train.lora import add_lora
from narrowboat.train.step import TrainStep, train_step
from train_kit import cross_entropy, mlp
from train_step_kit import GlobalNorm, adam, vectors
from train_weights_kit import Layers

FILES = ("weights.json", "weights.records", "optimizer.json", "optimizer.records")
STEPS = 3


def square(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (out - target).square().mean()


def made(layers: Layers, folder: Path | None, model: nn.Module | None = None, **options: Any) -> TrainStep:
    """A step whose weights, gradients and optimizer state are all on storage."""
    model = layers.skeleton() if model is None else model
    kind = options.pop("kind", torch.optim.AdamW)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = {"budget": "64MiB", "micro_batches": 1, "adapt": False, "enforce": False, **options}
    return train_step(model, square, optimizer, spill=folder, weights=layers.path, **options)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(12, 64, generator=generator), torch.randn(12, 64, generator=generator)


class Runs:
    """What a run leaves after each step, and what training in memory gives."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers = Layers(root)
        self.whole = self._train("run")
        self.other = self._train("other")

    def _train(self, name: str) -> list[Path]:
        folder = self.root / name
        folder.mkdir()
        left = []
        with made(self.layers, folder) as step:
            for number in range(STEPS):
                step(*batch(number))
                left.append(shutil.copytree(folder, self.root / f"{name} after {number + 1}"))
        return left

    def plain(self, steps: int) -> tuple[nn.Module, list[float]]:
        model = self.layers.in_memory()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for number in range(steps):
            optimizer.zero_grad()
            loss = square(model(batch(number)[0]), batch(number)[1])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return model, losses

    def goes_on(self, folder: Path, steps: int) -> None:
        """Resume from a folder: it is at that step, to the bit, and goes on as training in memory does."""
        wanted, _ = self.plain(steps)
        with made(self.layers, folder, resume=True) as step:
            assert step.steps_done == steps
            assert same(step.model, wanted)
            step.prepare(*batch(steps))
            assert same(step.model, wanted)
            losses = [step(*batch(number)).item() for number in range(steps, steps + 2)]
            after, all_losses = self.plain(steps + 2)
            assert losses == all_losses[steps:]
            assert same(step.model, after) and step.steps_done == steps + 2


def same(model: nn.Module, plain: nn.Module) -> bool:
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return all(torch.equal(one.clone(), other) for one, other in pairs)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Runs(tmp_path_factory.mktemp("runs"))
    torch.set_num_threads(threads)


@pytest.fixture
def folder(runs: Runs, tmp_path: Path) -> Path:
    """A copy of what the run left after its last step."""
    return shutil.copytree(runs.whole[-1], tmp_path / "left")


def refused(runs: Runs, folder: Path, error: type[NarrowboatError], match: str) -> str:
    """Resuming raises in one line, at once, and changes nothing."""
    before = bytes_in(folder)
    with pytest.raises(error, match=match) as caught:
        made(runs.layers, folder, resume=True)
    assert bytes_in(folder) == before
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


# -- two files, one step ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(1, STEPS + 1))
def test_it_goes_on_from_the_last_step(runs: Runs, tmp_path: Path, steps: int) -> None:
    runs.goes_on(shutil.copytree(runs.whole[steps - 1], tmp_path / "left"), steps)


@pytest.mark.parametrize("ahead", ["weights", "optimizer"])
def test_where_one_is_a_step_ahead_it_goes_on_from_the_step_that_both_have(
    runs: Runs, tmp_path: Path, ahead: str
) -> None:
    """As a kill between the two commits leaves them; the weights of the step ahead must not be seen, either."""
    folder = shutil.copytree(runs.whole[1], tmp_path / "left")
    for name in FILES:
        if name.startswith(ahead):
            shutil.copy(runs.whole[2] / name, folder / name)
    runs.goes_on(folder, 2)


@pytest.mark.parametrize("missing", FILES)
def test_a_file_that_is_missing_is_told(runs: Runs, folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    assert "delete" in refused(runs, folder, SpillError, missing)


@pytest.mark.parametrize("older", ["weights", "optimizer"])
def test_files_of_different_steps_are_not_mixed(runs: Runs, folder: Path, older: str) -> None:
    for name in FILES:
        if name.startswith(older):
            shutil.copy(runs.whole[0] / name, folder / name)
    assert "3" in refused(runs, folder, SpillError, "different steps")


@pytest.mark.parametrize("name", ["weights", "optimizer"])
def test_files_of_different_runs_are_not_mixed(runs: Runs, folder: Path, name: str) -> None:
    for each in FILES:
        if each.startswith(name):
            shutil.copy(runs.other[-1] / each, folder / each)
    refused(runs, folder, SpillError, "different runs")


def test_two_ways_on_from_the_same_step_are_not_mixed(runs: Runs, tmp_path: Path) -> None:
    ways = [shutil.copytree(runs.whole[0], tmp_path / str(number)) for number in range(2)]
    for number, way in enumerate(ways):
        with made(runs.layers, way, resume=True) as step:
            for each in range(2):
                step(*batch(100 * number + each))
    for name in ("weights.json", "weights.records"):
        shutil.copy(ways[0] / name, ways[1] / name)
    refused(runs, ways[1], SpillError, "different runs")


def test_a_header_without_its_own_data_is_told(runs: Runs, folder: Path) -> None:
    shutil.copy(runs.whole[0] / "weights.records", folder / "weights.records")
    refused(runs, folder, SpillError, r"weights\.records")


def test_state_loaded_between_steps_stays_with_its_weights(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    folder.mkdir()
    with made(runs.layers, folder) as step:
        step(*batch(0))
        step.optimizer.load_state_dict(step.optimizer.state_dict())
        loaded = shutil.copytree(folder, tmp_path / "loaded")
        step(*batch(1))
        assert step.steps_done == 2
    runs.goes_on(loaded, 1)
    runs.goes_on(folder, 2)


def test_state_that_the_optimizer_has_before_the_first_step_is_stored_with_the_weights(
    runs: Runs, tmp_path: Path
) -> None:
    model = runs.layers.skeleton()
    step = made(runs.layers, tmp_path, model)
    trained = torch.optim.AdamW(runs.layers.in_memory().parameters(), lr=1e-2)
    for parameter in trained.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    trained.step()
    step.optimizer.load_state_dict(trained.state_dict())
    with step:
        step(*batch(0))
        wanted = step.optimizer.state_dict()["state"]
    with made(runs.layers, tmp_path, resume=True) as again:
        assert again.steps_done == 1
        again(*batch(1))
        assert int(again.optimizer.state_dict()["state"][0]["step"]) == int(wanted[0]["step"]) + 1 == 3


# -- nothing to go on from -------------------------------------------------------------------------


def test_an_empty_folder_is_told(runs: Runs, tmp_path: Path) -> None:
    refused(runs, tmp_path, UsageError, "nothing to go on from")


def test_what_a_run_left_that_made_no_whole_step_is_nothing_to_go_on_from(runs: Runs, tmp_path: Path) -> None:
    for name in ("weights.records", "optimizer.records"):
        (tmp_path / name).write_bytes(b"left behind by a kill")
    refused(runs, tmp_path, UsageError, "nothing to go on from")
    with made(runs.layers, tmp_path) as step:
        step(*batch(0))
    runs.goes_on(tmp_path, 1)


def test_a_folder_in_use_is_told(runs: Runs, folder: Path) -> None:
    with made(runs.layers, folder, resume=True) as step:
        step(*batch(3))
        with pytest.raises(SpillError, match="in use"):
            made(runs.layers, folder, resume=True)
        step(*batch(4))


def test_models_in_memory_are_resumed_by_their_state_dicts(runs: Runs, tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(UsageError, match="load_state_dict"):
        train_step(model, cross_entropy, adam(model), budget="1GiB", spill=tmp_path, resume=True)
    with pytest.raises(UsageError, match="load_state_dict"):
        train_step(model, cross_entropy, adam(model), budget="1GiB", resume=True)
    adapted = runs.layers.skeleton()
    add_lora(adapted, rank=2, targets=["0"])
    with pytest.raises(UsageError, match="load_state_dict"):
        made(runs.layers, tmp_path, adapted, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_there_is_nothing_to_go_on_from(runs: Runs) -> None:
    with pytest.raises(UsageError, match="spill="):
        made(runs.layers, None, resume=True)


@pytest.mark.parametrize("name", ["weights", "optimizer"])
def test_half_of_a_run_is_not_begun_over(runs: Runs, folder: Path, name: str) -> None:
    for suffix in ("json", "records"):
        (folder / f"{name}.{suffix}").unlink()
    before = bytes_in(folder)
    with pytest.raises(UsageError, match="resume=True"):
        made(runs.layers, folder)
    assert bytes_in(folder) == before


# -- damage ----------------------------------------------------------------------------------------


def place_in(folder: Path, name: str, newest: int = 0) -> tuple[int, int]:
    """Where the last record that counts begins, and its bytes."""
    told = json.loads((folder / f"{name}.json").read_text().partition("\n")[2])
    place, number = list(told["commits"][newest]["slots"].values())[-1][:2]
    _, nbytes, offset, capacity = told["places"][place]
    return offset + number * capacity, nbytes


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["weights", "optimizer"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_byte_of_the_data_that_is_not_what_it_was_is_told(runs: Runs, folder: Path, name: str, where: float) -> None:
    begin, nbytes = place_in(folder, name)
    at = nbytes - 1 if where < 0 else int(where * nbytes)
    flip(folder / f"{name}.records", begin + at)
    assert "delete" in refused(runs, folder, SpillError, rf"{name}\.records.*damaged")


@pytest.mark.parametrize("name", ["weights", "optimizer"])
def test_a_byte_of_the_other_generation_does_not_matter(runs: Runs, folder: Path, name: str) -> None:
    flip(folder / f"{name}.records", place_in(folder, name, newest=1)[0] + 1)
    runs.goes_on(folder, STEPS)


@pytest.mark.parametrize("name", ["weights.json", "optimizer.json"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_byte_of_a_header_that_is_not_what_it_was_is_told(runs: Runs, folder: Path, name: str, where: float) -> None:
    size = (folder / name).stat().st_size
    flip(folder / name, size - 1 if where < 0 else int(where * size))
    assert "delete" in refused(runs, folder, SpillError, f"{name} is damaged")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0.0, 0.6])
def test_a_file_cut_short_is_told(runs: Runs, folder: Path, name: str, left: float) -> None:
    os.truncate(folder / name, int(left * (folder / name).stat().st_size))
    assert "delete" in refused(runs, folder, SpillError, name)


# -- steps -----------------------------------------------------------------------------------------


def test_steps_are_counted(runs: Runs, tmp_path: Path) -> None:
    with made(runs.layers, tmp_path) as step:
        assert step.steps_done == 0
        step.prepare(*batch(0))
        assert step.steps_done == 0
        step(*batch(0))
        assert step.steps_done == 1
    model = mlp()
    ordinary = train_step(model, cross_entropy, adam(model), budget="1GiB")
    ordinary(*vectors(8)[0])
    ordinary.backward(*vectors(8)[0])
    assert ordinary.steps_done == 1


# -- refusals --------------------------------------------------------------------------------------


def test_a_budget_that_is_refused_leaves_nothing_behind(runs: Runs, tmp_path: Path) -> None:
    step = made(runs.layers, tmp_path, budget="500KB")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BudgetError):
        step(*batch(0))
    assert list(tmp_path.iterdir()) == []
    step.budget = "64MiB"
    losses = [step(*batch(number)).item() for number in range(2)]
    assert losses == runs.plain(2)[1]
    step.close()
    runs.goes_on(tmp_path, 2)


def test_a_step_that_is_only_prepared_leaves_nothing_behind(runs: Runs, tmp_path: Path) -> None:
    step = made(runs.layers, tmp_path)
    step.prepare(*batch(0))
    assert list(tmp_path.iterdir()) == []
    step.close()
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_that_is_refused_leaves_nothing_behind(runs: Runs, tmp_path: Path) -> None:
    step = made(runs.layers, tmp_path, kind=GlobalNorm)
    for _ in range(2):
        with pytest.raises(TrainingError, match="not per parameter"):
            step(*batch(0))
        assert list(tmp_path.iterdir()) == []
    step.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_full_leaves_nothing_behind(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from narrowboat.train.state.gradients import GradientStore

    def full(*_: Any, **__: Any) -> None:
        raise SpillError("No space left on device")

    step = made(runs.layers, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(GradientStore, "__init__", full)
        with pytest.raises(SpillError, match="space"):
            step(*batch(0))
    assert list(tmp_path.iterdir()) == []
    assert step(*batch(0)).item() == runs.plain(1)[1][0]
    step.close()


def test_a_budget_that_is_refused_leaves_what_was_there(runs: Runs, folder: Path) -> None:
    before = bytes_in(folder)
    step = made(runs.layers, folder, budget="500KB", resume=True)
    with pytest.raises(BudgetError):
        step(*batch(3))
    assert bytes_in(folder) == before
    step.close()
    assert bytes_in(folder) == before
    runs.goes_on(folder, STEPS)


@pytest.mark.parametrize("which", ["weights.json", "optimizer.json"])
def test_a_commit_that_fails_is_no_step(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(which):
            raise OSError(28, "No space left on device")
        replace(source, target)

    step = made(runs.layers, tmp_path)
    step(*batch(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SpillError, match="space"):
            step(*batch(1))
    assert step.steps_done == 1
    with pytest.raises(TrainingError, match="resume=True"):
        step(*batch(1))
    step.close()
    runs.goes_on(tmp_path, 1)


# -- kills -----------------------------------------------------------------------------------------

# One process imports torch, trains for a step, and forks a child for each moment at which the next ones are killed.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch
torch.set_num_threads(1)
from test_resume import made, batch, shutil
from train_weights_kit import Layers

root = Path(sys.argv[1])
layers = Layers(root)
moments = [("pwritev", 1), ("pwritev", 18), ("replace", 1), ("replace", 2), ("replace", 3), ("replace", 4)]
for name, number in moments:
    folder = root / f"{name} {number}"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        with made(layers, folder) as step:
            step(*batch(0))
            call, calls = getattr(os, name), []
            def until_killed(*arguments):
                calls.append(arguments)
                if len(calls) == number and name == "pwritev":
                    os.kill(os.getpid(), signal.SIGKILL)
                done = call(*arguments)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done
            setattr(os, name, until_killed)
            step(*batch(1))
            step(*batch(2))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, (name, number)
"""


def test_a_run_killed_at_any_moment_goes_on_from_its_last_whole_step(runs: Runs, tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    # The commits of a step are one of the weights, then one of the optimizer; only then it is whole.
    whole = {"replace 2": 2, "replace 3": 2, "replace 4": 3}
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 6
    for folder in folders:
        steps = whole.get(folder.name, 1)
        with made(runs.layers, folder, resume=True) as step:
            assert step.steps_done == steps, folder.name
            assert same(step.model, runs.plain(steps)[0]), folder.name
            assert step(*batch(steps)).item() == runs.plain(steps + 1)[1][-1], folder.name
            assert step(*batch(steps + 1)).item() == runs.plain(steps + 2)[1][-1], folder.name


def test_the_smallest_budget_that_a_refusal_names_is_enough_for_weights_on_storage(tmp_path: Path) -> None:
    """A bucket that is stepped has to be in the window of weights together."""
    torch.manual_seed(0)
    full = nn.Sequential(*(nn.Linear(256, 256) for _ in range(10)), nn.Linear(256, 10))
    save_file(full.state_dict(), tmp_path / "net.safetensors")
    x, y = torch.randn(64, 256), torch.randint(10, (64,))

    def trained(budget: int) -> list[float]:
        folder = tmp_path / f"spill {budget}"
        folder.mkdir()
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(10)), nn.Linear(256, 10))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        weights = tmp_path / "net.safetensors"
        with train_step(model, F.cross_entropy, optimizer, budget=budget, spill=folder, weights=weights) as step:
            return [float(step(x, y)) for _ in range(2)]

    with pytest.raises(BudgetError) as refusal:
        trained(6 << 20)
    assert refusal.value.minimum is not None
    optimizer = torch.optim.AdamW(full.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(full(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert trained(int(refusal.value.minimum * 1.1)) == pytest.approx(losses, rel=1e-6)
