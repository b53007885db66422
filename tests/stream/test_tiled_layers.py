"""Layers larger than the budget: the right answers, in tiles, within the budget."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrowboat as nb
from narrowboat.errors import BudgetError, TiledWeightError
from narrowboat.stream.prepare import prepare
from tiles_kit import MIB, ROUNDING, Kit, check, in_a_process, tiles_kit  # noqa: F401


def linear(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(512, 2300, dtype=dtype, **options), nn.ReLU())


@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 3, 512), (7, 1, 2, 512)])
@pytest.mark.parametrize("packed", [True, False])
def test_a_linear_layer_of_any_leading_sizes(kit: Kit, shape: tuple[int, ...], packed: bool) -> None:
    model = check(kit, linear(), torch.randn(shape), packed=packed)
    assert nb.session(model).stats()["tiled_layers"] == {"0": 5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_layer_of_half_precision(kit: Kit, dtype: torch.dtype) -> None:
    check(kit, lambda: nn.Linear(1024, 2300, bias=False, dtype=dtype), torch.randn(3, 1024).to(dtype))


def test_one_row_at_a_time_through_aligned_tiles_gives_the_very_same_bits(kit: Kit) -> None:
    torch.manual_seed(0)
    plain, x = linear()(), torch.randn(1, 512)
    model = kit.stream(linear(), kit.at_rest(plain), (x,))
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    assert nb.session(model).stats()["copied_bytes"] == 0


def test_rows_that_are_no_pages_are_read_with_one_copy(kit: Kit) -> None:
    model = check(kit, lambda: nn.Linear(2049, 1800), torch.randn(2, 2049))
    stats = nb.session(model).stats()
    assert stats["copied_bytes"] > 0 and stats["fixed_parts"]["staging"] > 0


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        (lambda: nn.Conv1d(256, 1024, 3, padding=1), (2, 256, 40)),
        (lambda: nn.Conv1d(256, 1024, 3), (256, 40)),
        (lambda: nn.Conv2d(128, 512, 3, stride=2, padding=1, bias=False), (1, 128, 14, 15)),
        (lambda: nn.Conv2d(128, 512, 3, padding="same", dilation=2), (2, 128, 9, 9)),
        (lambda: nn.Conv2d(128, 512, 3, padding=1, padding_mode="reflect"), (1, 128, 9, 11)),
        (lambda: nn.Conv2d(256, 1024, 3, padding=1, groups=4), (1, 256, 9, 9)),
        (lambda: nn.Conv3d(64, 300, 3, padding=1, padding_mode="circular"), (1, 64, 4, 5, 6)),
    ],
)
@pytest.mark.parametrize("traced", [True, False])
def test_convolutions(kit: Kit, factory: Callable[[], nn.Module], shape: tuple[int, ...], traced: bool) -> None:
    check(kit, lambda: nn.Sequential(factory(), nn.ReLU()), torch.randn(shape), traced=traced)


def test_a_channels_last_input_gives_a_channels_last_output(kit: Kit) -> None:
    x = torch.randn(2, 128, 9, 9).contiguous(memory_format=torch.channels_last)
    check(kit, lambda: nn.Conv2d(128, 512, 3), x)


def test_a_convolution_of_one_group_that_large_is_left_whole(kit: Kit) -> None:
    plain = nn.Sequential(nn.Conv1d(512, 512, 3, groups=2), nn.Conv1d(512, 8, 1))
    path = kit.at_rest(plain)
    x = torch.randn(1, 512, 10)
    model = kit.stream(lambda: nn.Sequential(nn.Conv1d(512, 512, 3, groups=2), nn.Conv1d(512, 8, 1)), path, (x,))
    assert nb.session(model).stats()["tiled_layers"] in ({}, {"0": 2})


class Words(nn.Module):
    """A large table and a head, tied or not."""

    def __init__(self, tied: bool = False, words: int = 9000, width: int = 96) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.words(indices)))


@pytest.mark.parametrize(("tied", "packed"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("traced", [True, False])
def test_an_embedding_and_its_head(kit: Kit, tied: bool, packed: bool, traced: bool) -> None:
    indices = torch.tensor([[0, 1, 8999, 17, 17], [4000, 4001, 4002, 0, 5]])
    model = check(kit, lambda: Words(tied), indices, packed=packed, traced=traced)
    assert nb.session(model).stats()["tiled_layers"].keys() == {"words", "head"}
    if tied:
        assert model.head.weight is model.words.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (5, 700)])
def test_rows_of_a_table_are_copied_bit_by_bit(kit: Kit, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(40_000, 33, dtype=dtype)
    path = kit.at_rest(plain, packed=False)
    model = kit.stream(lambda: nn.Embedding(40_000, 33, dtype=dtype), path, (torch.zeros(7, dtype=torch.long),))
    indices = torch.randint(0, 40_000, shape)
    with torch.inference_mode():
        for given in (indices, indices.int(), torch.full_like(indices, 39_999)):
            assert torch.equal(model(given), plain(given))


def test_an_index_beyond_the_table_raises_what_pytorch_raises(kit: Kit) -> None:
    plain = nn.Embedding(40_000, 32)
    model = kit.stream(lambda: nn.Embedding(40_000, 32), kit.at_rest(plain), (torch.zeros(1, dtype=torch.long),))
    with torch.inference_mode():
        for wrong in (-1, 40_000):
            with pytest.raises(IndexError, match="out of range"):
                model(torch.tensor([wrong]))
        with pytest.raises(RuntimeError):
            model(torch.tensor([1.0]))
        assert torch.equal(model(torch.tensor([5])), plain(torch.tensor([5])))


def test_a_lookup_in_a_table_larger_than_the_budget_reads_the_pages_of_its_rows(kit: Kit) -> None:
    plain = nn.Embedding(250_000, 64)
    path = kit.at_rest(plain)
    indices = torch.tensor([3, 249_999, 77_777, 3, 4, 5, 120_000, 120_001])
    model = nb.stream(lambda: nn.Embedding(250_000, 64), path, budget="8MiB", example=(indices,))
    kit.opened.append(model)
    assert plain.weight.nbytes > 7 * nb.session(model).budget
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(model(indices), plain(indices))
    stats = nb.session(model).stats()
    assert all(0 < nbytes <= 5 * 2 * 4096 for nbytes in stats["bytes_read"])  # five places, each on two pages at most
    assert stats["copied_bytes"] == 0


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 7}, {"include_last_offset": True}])
def test_bags(kit: Kit, mode: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)

    def factory() -> nn.Module:
        return nn.EmbeddingBag(20_000, 48, mode=mode, **options)

    plain = factory()
    flat, offsets = torch.tensor([7, 1, 19_999, 7, 500, 3, 3]), torch.tensor([0, 2, 2, 7])
    model = kit.stream(factory, kit.at_rest(plain), (flat, offsets))
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(model(flat, offsets), plain(flat, offsets))
        if not options.get("include_last_offset"):
            assert torch.equal(model(flat.view(1, 7)), plain(flat.view(1, 7)))
        if mode == "sum":
            weights = torch.rand(7)
            assert torch.equal(model(flat, offsets, weights), plain(flat, offsets, weights))
    assert nb.session(model).stats()["tiled_layers"] == {"": 0}


def test_empty_batches(kit: Kit) -> None:
    model = kit.stream(linear(), kit.at_rest(linear()()), (torch.randn(2, 512),))
    with torch.inference_mode():
        assert model(torch.empty(0, 512)).shape == (0, 2300)


def test_the_layer_stays_what_it_was_but_for_the_bytes_of_its_weight(kit: Kit) -> None:
    plain = linear()()
    path = kit.at_rest(plain)
    model = kit.stream(linear(), path, (torch.randn(2, 512),))
    layer = model[0]
    assert type(layer) is nn.Linear and (layer.in_features, layer.out_features) == (512, 2300)
    assert layer.weight.shape == (2300, 512) and layer.weight.dtype is torch.float32
    assert layer.weight.device.type == "cpu" and isinstance(layer.weight, nn.Parameter)
    assert [name for name, _ in model.named_parameters()] == list(plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model.state_dict()["0.bias"].clone(), plain[0].bias)
    for touch in (lambda: layer.weight.sum(), lambda: layer.weight[0], lambda: layer.weight.clone()):
        with pytest.raises(TiledWeightError, match=r"'0\.weight' .* 5 tiles"):
            touch()
    with pytest.raises(TiledWeightError):
        torch.save(model.state_dict(), kit.folder / "state.pt")
    with torch.inference_mode():  # and it goes on
        x = torch.randn(1, 512)
        assert torch.equal(model(x), plain(x))


def test_closing_takes_the_tiles_off_again(kit: Kit) -> None:
    plain, x = linear()(), torch.randn(1, 512)
    path = kit.at_rest(plain)
    model = kit.stream(linear(), path, (x,))
    nb.session(model).close()
    again = nb.stream(model, path, budget="64MiB", example=(x,))
    kit.opened.append(again)
    assert nb.session(again).stats()["tiled_layers"] == {}
    with torch.inference_mode():
        assert torch.equal(again(x), plain(x))


def test_a_budget_that_holds_the_layer_leaves_it_whole(kit: Kit) -> None:
    path, x = kit.at_rest(linear()()), torch.randn(2, 512)
    whole, _ = prepare(linear(), path, ((x,), {})).check(1 << 40)
    least = kit.least(linear(), path, (x,))
    assert least < whole - 3 * MIB
    for budget, tiled in ((whole, False), (whole - 1, True)):
        model = nb.stream(linear(), path, budget=budget, example=(x,))
        kit.opened.append(model)
        session = nb.session(model)
        assert bool(session.stats()["tiled_layers"]) is tiled
        assert session.min_budget == least
        assert ("layer in" in str(session.plan) and "tiles" in str(session.plan)) is tiled


def test_tiles_are_as_large_as_leaves_room_for_two(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.stream.tiling._TRIED", 1)  # else the measured speed of this machine has a say
    path, x = kit.at_rest(linear()()), torch.randn(1, 512)
    small = nb.session(kit.stream(linear(), path, (x,))).stats()["tiled_layers"]["0"]
    large = nb.session(kit.stream(linear(), path, (x,), more=3 * MIB)).stats()["tiled_layers"]["0"]
    assert large < small


def test_a_live_budget_grows_and_shrinks_within_its_tiles(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.stream.tiling._TRIED", 1)  # the largest tiles that fit, though others be quicker

    def factory() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 8192), nn.ReLU(), nn.Linear(8192, 16))

    torch.manual_seed(0)
    plain, x = factory(), torch.randn(1, 512)
    path = kit.at_rest(plain)
    model = kit.stream(factory, path, (x,), more=6 * MIB)
    session = nb.session(model)
    with torch.inference_mode():
        want = plain(x)
        assert torch.equal(model(x), want)
        session.budget = "64MiB"
        assert torch.equal(model(x), want) and torch.equal(model(x), want)
        assert session.stats()["bytes_read"][-1] == 0
        floor, _ = session.prepared.check(1 << 40)
        assert session.min_budget < floor
        with pytest.raises(BudgetError, match="streamed anew") as refused:
            session.budget = session.min_budget
        assert refused.value.minimum == floor
        session.budget = floor
        assert torch.equal(model(x), want) and torch.equal(model(x), want)


class Sideways(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(512, 2300, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.table.weight)


def test_a_weight_used_outside_its_layer_is_left_whole_if_that_is_known(kit: Kit) -> None:
    plain, x = Sideways(), torch.randn(1, 512)
    path = kit.at_rest(plain)
    model = kit.stream(Sideways, path, (x,))
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    assert nb.session(model).stats()["tiled_layers"] == {}


def test_and_refused_by_name_if_it_is_not(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    model = kit.stream(Sideways, kit.at_rest(Sideways()), None)
    with torch.inference_mode(), pytest.raises(TiledWeightError, match=r"table\.weight.*example inputs"):
        model(torch.randn(1, 512))


def test_strips_bring_a_convolution_below_its_workspace(kit: Kit) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 32, 3, padding=1))

    x = torch.randn(1, 3, 256, 256)
    path = kit.at_rest(factory())
    whole = prepare(factory, path, ((x,), {}))
    model = check(kit, factory, x)
    session = nb.session(model)
    assert session.min_budget < whole.check(1 << 40)[0] - 4 * MIB
    assert "2" in session.stats()["tiled_layers"]


SETUP = """
def factory():
    return nn.Sequential(nn.Embedding(30000, 512), nn.Linear(512, 24000), nn.ReLU(), nn.Linear(24000, 64))
x = torch.arange(0, 30000, 5000)
"""


def test_a_process_stays_within_a_budget_a_quarter_of_its_largest_layer(kit: Kit) -> None:
    torch.manual_seed(0)

    def factory() -> nn.Module:
        layers = nn.Embedding(30_000, 512), nn.Linear(512, 24_000), nn.ReLU(), nn.Linear(24_000, 64)
        return nn.Sequential(*layers)

    plain: Any = factory()
    path, x = kit.at_rest(plain), torch.arange(0, 30_000, 5_000)
    budget = 14 * MIB
    assert kit.least(factory, path, (x,)) < budget  # the trace is kept, and the child finds it: its tracer stays out
    assert plain[0].weight.nbytes > plain[1].weight.nbytes > 3 * budget
    with torch.inference_mode():
        want = plain(x)
    told = in_a_process(path, budget, SETUP)
    assert told["tiled"].keys() >= {"0", "1"}
    assert told["over_baseline"] <= budget, told
    torch.testing.assert_close(torch.tensor(told["answer"]), want, rtol=0, atol=ROUNDING[want.dtype])
