"""Stand-ins that stay: whatever a model does with its weights, nothing that outlives an operator is in the window."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import narrowboat as nb
from narrowboat.arena.standin import is_standin
from narrowboat.train.weights import TrainingWeights


class Odd(nn.Module):
    """Layers and views of many kinds, used in ways that models use them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.bag = nn.Embedding(50, 32), nn.EmbeddingBag(20, 32)
        self.conv, self.norm = nn.Conv1d(32, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.transposed, self.prelu = nn.ConvTranspose1d(32, 32, 3, padding=1), nn.PReLU(32)
        self.lstm = nn.LSTM(32, 32, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.gru = nn.GRU(64, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layer_norm, self.group_norm = nn.LayerNorm(32), nn.GroupNorm(4, 32)
        self.bilinear = nn.Bilinear(32, 32, 16)
        self.narrow, self.out = nn.Linear(16, 16).to(torch.bfloat16), nn.Linear(16, 50)
        self.stack, self.pair = nn.Parameter(torch.randn(3, 32, 32)), nn.Parameter(torch.randn(64, 32))
        self.scale, self.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.empty(0, 4))
        self.weight_norm = parametrizations.weight_norm(nn.Linear(32, 32))
        self.spectral_norm = parametrizations.spectral_norm(nn.Linear(32, 32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.bag(ids % 20).unsqueeze(1)
        x = self.transposed(self.prelu(self.norm(self.conv(x.transpose(1, 2))))).transpose(1, 2)
        x = self.gru(self.lstm(x)[0])[0]
        x = self.encoder(self.attention(x, x, x)[0])
        x = self.group_norm(self.layer_norm(x).transpose(1, 2)).transpose(1, 2)
        first, second, third = self.stack.unbind(0)
        x = x @ self.stack[0] + x @ second.T + torch.einsum("btd,de->bte", x, third) + first.mean()
        keys, values = self.pair.chunk(2)
        x = F.linear(x, torch.cat([keys, values])[:32].contiguous()) * self.scale + x @ values
        x = F.linear(x, self.pair.view(32, 2, 32)[:, 0].float()) + self.pair[3].reshape(1, -1)
        x = self.spectral_norm(self.weight_norm(x)) + self.pair.mean(0).expand_as(x) + self.empty.sum()
        x = self.narrow(self.bilinear(x, x).bfloat16()).float()
        return F.cross_entropy(self.out(x).flatten(0, 1), ids.flatten())


IDS = torch.arange(21).view(3, 7) * 7 % 50


@pytest.mark.parametrize("trained", [False, True])
def test_odd_layers_have_the_gradients_and_answers_of_memory(tmp_path: Path, trained: bool) -> None:
    plain = Odd()
    path = tmp_path / "odd.safetensors"
    nb.pack(plain.state_dict(), path)
    if not trained:
        plain.requires_grad_(False)
        plain.embedding.weight.requires_grad_(True)  # the gradient has to come through all the rest
    model = copy.deepcopy(plain)
    for parameter in model.parameters() if trained else ():
        torch._C._swap_tensor_impl(parameter, nn.Parameter(parameter.to("meta")))
    with TrainingWeights.of(model, path, 250_000, store=tmp_path / "store" if trained else None) as weights:
        weights.window.poison = True
        for each in (model, plain):
            torch.manual_seed(9)
            each(IDS).backward()
        for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert is_standin(one) == (trained or name != "embedding.weight")
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad), name
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
        for mode in (torch.no_grad, torch.inference_mode):
            for training in (True, False):
                answers = []
                for each in (model.train(training), plain.train(training)):
                    torch.manual_seed(9)
                    with mode():
                        answers.append(each(IDS))
                assert torch.equal(*answers), (mode, training)
        assert weights.window.escaped_bytes == 0


VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t.t() if t.ndim == 2 else t.transpose(0, -1) if t.ndim else t,
    lambda t: t[0] if t.ndim and t.shape[0] else t,
    lambda t: t[..., 1:] if t.ndim and t.shape[-1] > 1 else t,
    lambda t: t[::2] if t.ndim else t,
    lambda t: t.unsqueeze(1) if 1 <= t.ndim < 4 else t,
    lambda t: t.squeeze(),
    lambda t: t.reshape(-1),
    lambda t: t.expand(2, *t.shape) if t.ndim < 4 else t,
    lambda t: t.chunk(2)[-1] if t.ndim else t,
    lambda t: t.unbind(-1)[0] if t.ndim and t.shape[-1] else t,
    lambda t: t.detach(),
    lambda t: t.diagonal() if t.ndim >= 2 else t,
    lambda t: t.narrow(0, 0, 1) if t.ndim and t.shape[0] else t,
    lambda t: t.contiguous(),
    lambda t: t.flatten(),
    lambda t: t.data,
]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[torch.Tensor, torch.Tensor, TrainingWeights]]:
    path = tmp_path_factory.mktemp("matrix") / "matrix.safetensors"
    plain = nn.Linear(6, 8, bias=False).requires_grad_(False)
    nb.pack(plain.state_dict(), path)
    model = copy.deepcopy(plain)
    with TrainingWeights.of(model, path, "1MB") as weights:
        weights.window.poison = True
        yield model.weight, plain.weight, weights


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(VIEWS), max_size=5), st.sampled_from([torch.enable_grad, torch.inference_mode]))
def test_any_view_of_a_stand_in_is_that_view_of_the_weight(
    matrix: tuple[torch.Tensor, torch.Tensor, TrainingWeights],
    views: list[Callable[[torch.Tensor], torch.Tensor]],
    mode: Callable[[], torch.no_grad],
) -> None:
    one, other, weights = matrix
    with mode():
        for view in views:
            one, other = view(one), view(other)
        assert one.shape == other.shape
        assert one.stride() == other.stride()
        assert torch.equal(one.clone(), other)
        assert torch.equal(one * 2, other * 2)
    assert weights.window.escaped_bytes == 0


def test_a_view_reads_nothing_until_an_operator_needs_bytes(tmp_path: Path) -> None:
    plain = nn.Linear(6, 8).requires_grad_(False)
    nb.pack(plain.state_dict(), tmp_path / "l.safetensors")
    model = copy.deepcopy(plain)
    with TrainingWeights.of(model, tmp_path / "l.safetensors", "1MB") as weights:
        view = model.weight.t()[1:].unsqueeze(0)
        assert is_standin(view)
        assert weights.bytes_read == 0
        assert torch.equal(view + 1, plain.weight.t()[1:].unsqueeze(0) + 1)


@pytest.mark.parametrize(
    "make",
    [
        torch.zeros_like,
        torch.randn_like,
        lambda t: torch.full_like(t, 3.0, dtype=torch.float64),
        lambda t: torch.ones_like(t.t()),
        lambda t: t.new_zeros(2, 3),
        lambda t: torch.zeros_like(t, memory_format=torch.preserve_format),
        lambda t: torch.empty_like(t, device="meta"),
    ],
)
def test_what_is_made_like_a_stand_in_reads_nothing(
    matrix: tuple[torch.Tensor, torch.Tensor, TrainingWeights], make: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    one, other, weights = matrix
    before, results = weights.bytes_read, []
    for weight in (one, other):
        torch.manual_seed(0)
        results.append(make(weight))
    made, want = results
    assert weights.bytes_read == before
    assert (made.dtype, made.device, made.shape, made.stride()) == (want.dtype, want.device, want.shape, want.stride())
    assert want.is_meta or torch.equal(made, want)


def test_a_state_dict_of_stand_ins_can_be_saved(tmp_path: Path) -> None:
    plain = nn.Linear(6, 8).requires_grad_(False)
    nb.pack(plain.state_dict(), tmp_path / "l.safetensors")
    model = copy.deepcopy(plain)
    with TrainingWeights.of(model, tmp_path / "l.safetensors", "1MB"):
        torch.save(model.state_dict(), tmp_path / "saved.pth")
    saved = torch.load(tmp_path / "saved.pth", weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in plain.state_dict().items())
