"""Low-rank adapters: as the paper has them, beside layers whose names and answers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from narrowboat.errors import UsageError
from narrowboat.train.lora import LoraLinear, add_lora, lora_state_dict, merge


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj, self.o_proj = nn.Linear(6, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.v_proj(torch.tanh(self.q_proj(x))))


@pytest.fixture
def block() -> Block:
    return Block()


X = torch.linspace(-1, 1, 12).view(2, 6)


def test_a_model_begins_as_it_was(block: Block) -> None:
    want, names = block(X), set(block.state_dict())
    add_lora(block, rank=2)
    assert torch.equal(block(X), want)
    assert names <= set(block.state_dict()), "the weights keep their names"


def test_only_the_adapters_are_trained(block: Block) -> None:
    parameters = add_lora(block, rank=2, targets=["q_proj", "o_proj"])
    assert [tuple(p.shape) for p in parameters] == [(2, 6), (6, 2), (2, 4), (6, 2)]
    assert {id(p) for p in block.parameters() if p.requires_grad} == {id(p) for p in parameters}


def test_one_target_is_a_whole_name_and_no_part_of_one(block: Block) -> None:
    block.proj = nn.Linear(6, 6)
    add_lora(block, rank=2, targets="q_proj")
    assert isinstance(block.q_proj, LoraLinear) and not isinstance(block.proj, LoraLinear)


def test_the_answer_is_that_of_the_paper(block: Block) -> None:
    plain = copy.deepcopy(block.q_proj)
    add_lora(block, rank=2, alpha=6, targets=["q_proj"])
    layer = block.q_proj
    nn.init.normal_(layer.lora_B.weight)
    low, high = layer.lora_A.weight, layer.lora_B.weight
    torch.testing.assert_close(layer(X), plain(X) + 6 / 2 * (X @ low.T @ high.T))


def test_merged_the_model_is_plain_again_and_answers_the_same(block: Block) -> None:
    for parameter in add_lora(block, rank=2):
        nn.init.normal_(parameter)
    want, names = block(X), set(Block().state_dict())
    merge(block)
    assert set(block.state_dict()) == names
    assert not any(isinstance(m, LoraLinear) for m in block.modules())
    torch.testing.assert_close(block(X), want)


def test_a_layer_in_two_places_has_one_adapter_merged_once(block: Block) -> None:
    block.k_proj = block.q_proj
    parameters = add_lora(block, rank=2, targets=["q_proj", "k_proj"])
    assert len(parameters) == 2 and block.k_proj is block.q_proj
    nn.init.normal_(parameters[1])
    want = block(X)
    merge(block)
    torch.testing.assert_close(block(X), want)
    assert block.k_proj.weight is block.q_proj.weight


def test_adapters_are_saved_and_loaded_alone(block: Block) -> None:
    for parameter in add_lora(block, rank=2):
        nn.init.normal_(parameter)
    other = Block()
    add_lora(other, rank=2)
    state = lora_state_dict(block)
    assert len(state) == 4
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(other(X), block(X))


def test_a_half_precision_layer_keeps_its_dtype_and_trains_in_single(block: Block) -> None:
    block.bfloat16()
    parameters = add_lora(block, rank=2)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert block(X.bfloat16()).dtype == torch.bfloat16


def test_dropout_is_on_the_adapters_inputs_in_training_only(block: Block) -> None:
    for parameter in add_lora(block, rank=2, dropout=0.5):
        nn.init.normal_(parameter)
    torch.manual_seed(0)
    assert not torch.equal(block.train()(X), block(X))
    assert torch.equal(block.eval()(X), block(X))


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"rank": 1.5}, {"rank": True}, {"dropout": 1.0}, {"targets": ["nothing"]}]
)
def test_what_cannot_be_done_is_refused_before_anything_changes(block: Block, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        add_lora(block, **options)  # type: ignore[arg-type]
    assert all(p.requires_grad for p in block.parameters())
    assert type(block.q_proj) is nn.Linear


def test_adapters_are_not_put_on_adapters_nor_merged_into_nothing(block: Block) -> None:
    add_lora(block, rank=2)
    with pytest.raises(UsageError, match="already"):
        add_lora(block, rank=2)
    with pytest.raises(UsageError, match="in memory"):
        merge(block.to("meta"))


@pytest.mark.parametrize("target", ["out_proj", "linear1"])
def test_layers_whose_weights_are_used_without_calling_them_are_refused(target: str) -> None:
    with pytest.raises(UsageError, match="without calling"):
        add_lora(nn.TransformerEncoderLayer(8, 2, 8), rank=2, targets=[target])
