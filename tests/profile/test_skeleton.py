"""The skeleton: structure without storage, and its weights matched with those at rest."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrowboat as nb
from narrowboat.checkpoint import open_index
from narrowboat.errors import ForeignHooksError, ModelError, WeightsMismatchError
from narrowboat.machine.memory import process_memory
from narrowboat.profile.order import execution_order, split_example
from narrowboat.profile.skeleton import (
    build_skeleton,
    fixed_buffer_bytes,
    is_materialised,
    match_weights,
    tensor_names,
)


class Mixed(nn.Module):
    """A tied pair, a kept buffer, a buffer computed in ``__init__`` that no file has, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.register_buffer("kept", torch.arange(4.0))
        self.register_buffer("angles", torch.linspace(0, 1, 9), persistent=False)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.embed(i)))


def test_parameters_have_shapes_and_no_bytes_and_buffers_are_real() -> None:
    skeleton = build_skeleton(Mixed)
    assert all(p.is_meta for p in skeleton.parameters())
    assert [(n, tuple(p.shape), p.requires_grad) for n, p in skeleton.named_parameters()] == [
        (n, tuple(p.shape), p.requires_grad) for n, p in Mixed().named_parameters()
    ]
    assert torch.equal(skeleton.angles, torch.linspace(0, 1, 9))
    assert fixed_buffer_bytes(skeleton) == 36
    assert not is_materialised(skeleton)


def test_ties_stay_ties() -> None:
    skeleton = build_skeleton(Mixed)
    assert skeleton.head.weight is skeleton.embed.weight
    assert ["embed.weight", "head.weight"] in [names for _, names, _ in tensor_names(skeleton).values()]


def test_modules_made_afterwards_are_ordinary() -> None:
    build_skeleton(Mixed)
    assert not any(p.is_meta for p in Mixed().parameters())


def test_a_factory_that_fails_leaves_torch_as_it_was() -> None:
    def factory() -> nn.Module:
        nn.Linear(2, 2)
        raise RuntimeError("no")

    with pytest.raises(ModelError, match=r"factory.*RuntimeError: no"):
        build_skeleton(factory)
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_model_larger_than_the_memory_spared_for_it_is_built_without_its_bytes() -> None:
    before = process_memory().rss
    skeleton = build_skeleton(lambda: nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(16)]))
    assert sum(p.nbytes for p in skeleton.parameters()) > 1 << 30
    assert process_memory().rss - before < 200 << 20


def test_weights_are_matched_by_name_ties_once(tmp_path: Path) -> None:
    nb.pack(Mixed().state_dict(), tmp_path / "w.safetensors")
    skeleton = build_skeleton(Mixed)
    matched = match_weights(skeleton, open_index(tmp_path / "w.safetensors"))
    assert [weight.name for weight in matched.weights].count("embed.weight") == 1
    assert len(matched.weights) == 4
    assert matched.numbers[id(skeleton.head.weight)] == matched.numbers[id(skeleton.embed.weight)]
    assert id(skeleton.angles) not in matched.numbers


def test_a_tied_weight_saved_under_either_name_is_found(tmp_path: Path) -> None:
    state = Mixed().state_dict()
    for left_out in ("embed.weight", "head.weight"):
        file = tmp_path / f"{left_out}.safetensors"
        nb.pack({name: tensor for name, tensor in state.items() if name != left_out}, file)
        assert len(match_weights(build_skeleton(Mixed), open_index(file)).weights) == 4


def test_a_model_that_refers_to_its_tensors_may_not_be_matched_with_anothers(tmp_path: Path) -> None:
    nb.pack(nn.Linear(3, 3).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"4 missing.*2 in the file but not in the model"):
        match_weights(build_skeleton(Mixed), open_index(tmp_path / "w.safetensors"))


def test_a_buffer_that_older_files_have_and_newer_models_compute_is_no_mistake(tmp_path: Path) -> None:
    nb.pack({**Mixed().state_dict(), "angles": torch.zeros(9)}, tmp_path / "w.safetensors")
    assert len(match_weights(build_skeleton(Mixed), open_index(tmp_path / "w.safetensors")).weights) == 4


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (functools.partial(nn.LazyLinear, 3), ModelError),
        (lambda: torch.jit.script(nn.Linear(2, 2)), ModelError),
    ],
)
def test_modules_without_weights_to_hold_are_refused(module: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        build_skeleton(module())


def test_diffusers_hooks_are_refused() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    module = nn.Linear(2, 2)
    hooks.HookRegistry.check_if_exists_or_initialize(module)
    with pytest.raises(ForeignHooksError, match="diffusers"):
        build_skeleton(module)


def test_the_order_for_packing_is_the_order_of_use(tmp_path: Path) -> None:
    nb.pack(Mixed().state_dict(), tmp_path / "w.safetensors")
    order = execution_order(Mixed, open_index(tmp_path / "w.safetensors"), (torch.zeros(1, 3, dtype=torch.long),))
    assert order == ["embed.weight", "frozen.weight", "frozen.bias"]


def test_examples_are_tuples_or_dicts() -> None:
    assert split_example((1, 2)) == ((1, 2), {})
    assert split_example({"x": 1}) == ((), {"x": 1})
