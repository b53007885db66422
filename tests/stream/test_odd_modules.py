"""Modules that use weights in ways hooks round ``forward`` do not see: still plain PyTorch's bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import narrowboat as nb
from architecture_kit import check
from narrowboat.errors import StreamedModelError

WIDTH = 32


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 7, WIDTH)), generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """``MultiheadAttention`` uses ``out_proj``'s weight without ever calling ``out_proj``."""

    def __init__(self, need_weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=batch_first)
        self.after = nn.Linear(WIDTH, WIDTH)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor) -> Any:
        x = self.before(x)
        x, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return self.after(x), weights


class CrossAttention(nn.Module):
    """Keys and values of other widths: three separate input projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=16, vdim=24, bias=False, add_bias_kv=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.attention(x, x[..., :16], x[..., :24], need_weights=False)[0]


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 3)


class Encoder(nn.Module):
    """The encoder's fast path reads every weight of its layers without calling what owns them."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.encoder = _encoder()
        self.head = nn.Linear(WIDTH, 5)
        self.masked = masked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, -2:] = True
        return self.head(self.encoder(x, src_key_padding_mask=mask if self.masked else None))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(WIDTH, 4, 1, 2, 48, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, x[:, :3])


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, 24, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.head = nn.LazyLinear(3)
        self.head(torch.zeros(1, 2 * (options.get("proj_size") or 24)))

    def forward(self, x: torch.Tensor) -> Any:
        out, state = self.rnn(x)
        return self.head(out), state


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(WIDTH, 16), nn.GRUCell(WIDTH, 16)

    def forward(self, x: torch.Tensor) -> Any:
        hidden, state, other = None, None, torch.zeros(x.shape[0], 16)
        for step in x.unbind(1):
            hidden, state = self.lstm(step, None if hidden is None else (hidden, state))
            other = self.gru(step, other)
        return hidden, state, other


class Normed(nn.Module):
    """Parametrisations compute the weight when it is read, from parameters of their own."""

    def __init__(self, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first = norm(nn.Linear(WIDTH, 24))
        self.second = norm(nn.Conv1d(7, 5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Tied(nn.Module):
    """Embedding and head share one tensor, and the head is no module at all."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        if not functional:
            self.head = nn.Linear(WIDTH, 50, bias=False)
            self.head.weight = self.embedding.weight
        self.functional = functional

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.middle(self.embedding(ids)))
        return F.linear(x, self.embedding.weight) if self.functional else self.head(x)


class Shared(nn.Module):
    """One block called many times, another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.other = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.same = self.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.other:
            x = self.same(layer(self.block(x)))
        return x


class Lists(nn.Module):
    """Parameters in lists and dicts, read as data; an expert stack indexed by number."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([torch.randn(WIDTH, WIDTH) for _ in range(3)])
        self.named = nn.ParameterDict({"scale": torch.randn(WIDTH), "shift": torch.randn(WIDTH)})
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.codebook = nn.Embedding(20, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        for row in self.rows:
            x = x @ row.t() / WIDTH
        x = x * self.named["scale"] + self.named["shift"]
        for expert in (3, 1):
            x = torch.tanh(x @ self.experts[expert])
        distance = torch.cdist(x, self.codebook.weight)
        return distance.argmin(-1), self.codebook.weight[distance.argmin(-1)], float(self.named["scale"][0])


class Branches(nn.Module):
    """Which weights are used depends on the data; the trace cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            scores = self.router(x).mean((0, 1))
            x = self.left(x) if scores[0] > scores[1] else self.right(x).flip(0)
            x = torch.tanh(x) * 3
        return x


class Sometimes(nn.Module):
    """A layer that every second call uses, and an exit before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for i, layer in enumerate(self.layers):
            if i == 2 and self.calls % 2:
                continue
            if i == 5 and self.calls == 2:
                return x
            x = torch.tanh(layer(x))
        return x


class Buffers(nn.Module):
    """Persistent and non-persistent buffers, a plain attribute, statistics, a mask of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(7)
        self.register_buffer("scale", torch.rand(WIDTH))
        self.register_buffer("window", torch.hann_window(WIDTH), persistent=False)
        self.register_buffer("steps", torch.tensor(4))
        self.plain = torch.linspace(0, 1, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.norm(x)) * self.scale + self.window
        for _ in range(int(self.steps)):
            x = torch.tanh(self.second(x)) * self.plain
        return x


class DictPassing(nn.Module):
    """Layers write to one dict that is passed by identity."""

    class Layer(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number, self.linear = number, nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor, notes: dict[str, Any]) -> torch.Tensor:
            x = torch.tanh(self.linear(x) + notes.get("last", 0))
            notes["last"], notes[str(self.number)] = x, id(notes)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(i) for i in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        notes: dict[str, Any] = {}
        for layer in self.layers:
            x = layer(x, notes)
        assert all(notes[str(i)] == id(notes) for i in range(4))
        return x, len(notes)


class Asks(nn.Module):
    """Asks weights for their device, dtype, shape and more while they are out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 9).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.second.weight
        assert not weight.is_meta and weight.ndim == 2 and weight.is_contiguous() and weight.stride() == (WIDTH, 1)
        x = self.first(x.to(self.first.weight.device))
        bound = torch.finfo(weight.dtype).max
        return self.second(x.clamp(-bound, bound).to(device=weight.device, dtype=weight.dtype))


class LateView(nn.Module):
    """A view made in one place is used much later."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        view = self.table[:, : WIDTH // 2].t()
        for layer in self.layers:
            x = layer(x)
        return x @ view.t()


class Detached(nn.Module):
    """Reads weights through ``.data`` and ``.detach()``, and through conversions that have nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        x = x[:, :3]  # not contiguous: matmul then chooses its path by requires_grad
        same = self.layers[0].weight.float()
        for layer in self.layers:
            x = F.linear(x, layer.weight.detach(), layer.bias.data)
            x = F.linear(x.transpose(0, 1), layer.weight).transpose(0, 1) @ layer.weight.data.t()
            x = torch.tanh(x)
        return x, F.linear(x.transpose(0, 1), same), self.layers[1].weight.contiguous().to(torch.float32)


class Cached(nn.Module):
    """Computes something from a weight once and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = self.table.weight[: WIDTH // 2]
        for layer in self.layers:
            x = layer(x)
        return x[..., : WIDTH // 2] @ self.kept


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor]]] = {
    "attention fast path": (lambda: Attention(False), {"x": _x()}),
    "attention with weights": (lambda: Attention(True), {"x": _x()}),
    "attention, time first": (lambda: Attention(False, batch_first=False), {"x": _x()}),
    "attention, other widths": (CrossAttention, {"x": _x()}),
    "encoder fast path": (lambda: Encoder(False), {"x": _x()}),
    "encoder, nested tensors": (lambda: Encoder(True), {"x": _x()}),
    "nn.Transformer": (Decoder, {"x": _x()}),
    "LSTM": (lambda: Recurrent(nn.LSTM), {"x": _x()}),
    "LSTM with projection": (lambda: Recurrent(nn.LSTM, proj_size=8), {"x": _x()}),
    "GRU": (lambda: Recurrent(nn.GRU), {"x": _x()}),
    "recurrent cells": (Cells, {"x": _x()}),
    "weight norm": (lambda: Normed(parametrizations.weight_norm), {"x": _x()}),
    "old weight norm": (lambda: Normed(torch.nn.utils.weight_norm), {"x": _x()}),
    "spectral norm": (lambda: Normed(parametrizations.spectral_norm), {"x": _x()}),
    "old spectral norm": (lambda: Normed(torch.nn.utils.spectral_norm), {"x": _x()}),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)), {"input": _x()}),
    "tied head": (lambda: Tied(False), {"ids": torch.arange(14).view(2, 7)}),
    "tied, functional": (lambda: Tied(True), {"ids": torch.arange(14).view(2, 7)}),
    "shared modules": (Shared, {"x": _x()}),
    "parameter lists": (Lists, {"x": _x()}),
    "branch on data": (Branches, {"x": _x()}),
    "module called sometimes": (Sometimes, {"x": _x()}),
    "buffers": (Buffers, {"x": _x()}),
    "dict passed by identity": (DictPassing, {"x": _x()}),
    "asks weights for facts": (Asks, {"x": _x()}),
    "view used later": (LateView, {"x": _x()}),
    "weights read detached": (Detached, {"x": _x()}),
    "view kept on the module": (Cached, {"x": _x()}),
}


def _factory(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        torch.manual_seed(3)
        return make().eval()

    return factory


@pytest.mark.parametrize("name", CASES)
def test_outputs_have_plain_pytorchs_bits(name: str, tmp_path: Path, tiny_blocks: None) -> None:
    make, inputs = CASES[name]
    factory = _factory(make)
    plain = factory()
    files = check.write_files(plain, factory, inputs, tmp_path)
    reference = check.Reference.of(factory, plain.state_dict(), inputs)
    outcomes = {v: check.check_variant(v, factory, files, inputs, reference) for v in check.VARIANTS}
    assert {v: o.detail or o.verdict for v, o in outcomes.items()} == dict.fromkeys(check.VARIANTS, "exact")


@pytest.fixture(params=check.VARIANTS)
def stream(request: pytest.FixtureRequest, tmp_path: Path, tiny_blocks: None) -> Any:
    """Streams a factory at its smallest budget, in one of the four ways; closes the sessions."""
    made: list[nn.Module] = []

    def make(factory: Callable[[], nn.Module], inputs: dict[str, torch.Tensor]) -> tuple[nn.Module, nn.Module]:
        plain = factory()
        kind, _, with_example = request.param.partition("+")
        weights = check.write_files(plain, factory, inputs, tmp_path)[kind]
        example = inputs if with_example else None
        budget = check.smallest_budget(factory, weights, example)
        made.append(nb.stream(factory, weights, budget=budget, example=example))
        return plain, made[-1]

    yield make
    for model in made:
        nb.session(model).close()


def test_other_input_shapes_than_the_example(stream: Any) -> None:
    plain, streamed = stream(_factory(lambda: Encoder(True)), {"x": _x()})
    for shape in ((2, 7, WIDTH), (1, 19, WIDTH), (5, 3, WIDTH), (2, 7, WIDTH)):
        with torch.inference_mode():
            assert torch.equal(streamed(_x(*shape)), plain(_x(*shape)))


def test_a_kept_view_of_a_weight_stays_what_it_was(stream: Any) -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(WIDTH, WIDTH)
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

        def forward(self, x: torch.Tensor) -> Any:
            x = x + self.table.weight[0]
            for layer in self.layers:
                x = layer(x)
            return x, self.table.weight[3:5], self.layers[2].weight.detach().t()

    plain, streamed = stream(_factory(Shows), {"x": _x()})
    kept = []
    with torch.inference_mode():
        expected = plain(_x())
        for _ in range(4):
            kept.append(streamed(_x()))
        for outputs in kept:
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_autocast(stream: Any, mode: Any) -> None:
    """Under ``no_grad`` it would cache casts of the weights, with weak references to them."""
    plain, streamed = stream(_factory(lambda: Tied(False)), {"ids": torch.arange(14).view(2, 7)})
    ids = torch.arange(14).view(2, 7)
    for _ in range(3):
        with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            expected, got = plain(ids), streamed(ids)
            assert torch.is_autocast_cache_enabled()
        assert got.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(got, expected)


def test_no_grad_and_inference_mode_give_each_the_plain_bits(stream: Any) -> None:
    plain, streamed = stream(_factory(lambda: Attention(False)), {"x": _x()})
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(streamed(_x())[0], plain(_x())[0])


def test_a_submodule_alone_gives_the_plain_bits(stream: Any) -> None:
    plain, streamed = stream(_factory(Shared), {"x": _x()})
    with torch.inference_mode():
        streamed(_x())
        for _ in range(2):
            assert torch.equal(streamed.other[1](_x()), plain.other[1](_x()))
            assert torch.equal(streamed.block(_x()), plain.block(_x()))
        assert torch.equal(streamed(_x()), plain(_x()))


def test_state_dict_holds_the_real_weights(stream: Any) -> None:
    plain, streamed = stream(_factory(Lists), {"x": _x()})
    with torch.inference_mode():
        streamed(_x())
    expected, got = plain.state_dict(), streamed.state_dict()
    assert list(expected) == list(got)
    assert all(torch.equal(expected[name], got[name].clone()) for name in expected)


def test_batch_norm_in_training_mode_is_refused_or_right(stream: Any) -> None:
    plain, streamed = stream(_factory(Buffers), {"x": _x()})
    plain.train()
    streamed.train()
    try:
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(streamed(_x()), plain(_x()))
    except StreamedModelError as error:
        assert "eval()" in str(error)
