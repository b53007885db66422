"""Random weights: the same for the same seed, at a scale that keeps activations finite, written whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from narrowboat import zoo
from narrowboat.errors import UsageError
from narrowboat.zoo.save import random_tensor, save_random_weights


def test_saved_weights_load_strictly_and_a_hundred_layers_stay_finite(tmp_path: Path) -> None:
    path = tmp_path / "resnet101.safetensors"
    seen: list[tuple[int, int]] = []
    size = save_random_weights("resnet101", path, progress=lambda done, total: seen.append((done, total)))
    assert path.stat().st_size == size
    assert seen[-1][0] == seen[-1][1]
    with torch.device("meta"):
        module = zoo.resnet101()
    module.load_state_dict(load_file(path), strict=True, assign=True)
    with torch.inference_mode():
        output = module(*zoo.resnet101.example_inputs())
    assert output.isfinite().all()
    assert output.std() > 0.01


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_random_weights("efficientnet_lite2", tmp_path / name, seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists"):
        save_random_weights("efficientnet_lite2", path)
    assert path.read_bytes() == b"precious"
    save_random_weights("efficientnet_lite2", path, overwrite=True)
    assert len(load_file(path)) == 386


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_random_weights("efficientnet_lite2", tmp_path / "model.safetensors", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        save_random_weights("efficientnet_lite2", tmp_path / "nowhere" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_kind_of_tensor_has_its_scale(dtype: torch.dtype) -> None:
    def draw(name: str, *shape: int) -> torch.Tensor:
        tensor = random_tensor(name, torch.empty(shape, dtype=dtype, device="meta"), seed=0)
        assert tensor.dtype == dtype
        return tensor.float()

    assert draw("conv.weight", 64, 32, 3, 3).std() == pytest.approx((2 / 288) ** 0.5, rel=0.05)
    assert draw("fc.weight", 64, 256).std() == pytest.approx(1 / 16, rel=0.05)
    assert draw("bn.running_var", 512).min() > 0.7
    assert draw("norm.weight", 512).min() >= 0.5
    assert random_tensor("n", torch.zeros((), dtype=torch.int64), seed=0).item() == 0
