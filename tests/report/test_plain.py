"""Plain PyTorch with the weights of an index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from narrowboat.checkpoint import open_index, pack
from narrowboat.errors import WeightsMismatchError
from narrowboat.profile.skeleton import build_skeleton
from narrowboat.report.plain import load_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(4, 4).to(torch.bfloat16), requires_grad=False)
        self.register_buffer("mask", torch.arange(4.0), persistent=False)


def _safetensors(state: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file({name: tensor for name, tensor in state.items() if name != "head.weight"}, folder / "w.safetensors")
    return folder / "w.safetensors"


def _packed(state: dict[str, torch.Tensor], folder: Path) -> Path:
    pack(state, folder / "w.safetensors")
    return folder / "w.safetensors"


def _torch(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "w.pth")
    return folder / "w.pth"


@pytest.mark.parametrize("write", [_safetensors, _packed, _torch])
@pytest.mark.parametrize("build", [Tied, lambda: build_skeleton(Tied)])
def test_the_module_is_what_load_state_dict_makes(
    tmp_path: Path,
    write: Callable[[dict[str, torch.Tensor], Path], Path],
    build: Callable[[], nn.Module],
) -> None:
    source = Tied()
    source.norm.running_mean.normal_()
    module = build()
    load_weights(module, open_index(write(source.state_dict(), tmp_path)))
    for name, tensor in source.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)
    assert module.head.weight is module.embed.weight
    assert module.embed.weight.requires_grad and not module.frozen.requires_grad
    assert torch.equal(module.mask, torch.arange(4.0))


def test_a_transposed_tensor_of_a_torch_file_arrives_in_its_own_shape(tmp_path: Path) -> None:
    source = nn.Linear(3, 5, bias=False)
    torch.save({"weight": source.weight.detach().t().contiguous().t()}, tmp_path / "w.pth")
    module = nn.Linear(3, 5, bias=False)
    load_weights(module, open_index(tmp_path / "w.pth"))
    assert torch.equal(module.weight, source.weight)


def test_buffers_alone_leave_the_parameters_on_meta(tmp_path: Path) -> None:
    module = build_skeleton(Tied)
    load_weights(module, open_index(_packed(Tied().state_dict(), tmp_path)), buffers_only=True)
    assert module.embed.weight.is_meta
    assert not module.norm.running_var.is_meta


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsMismatchError):
        load_weights(Tied(), open_index(tmp_path / "w.safetensors"))
