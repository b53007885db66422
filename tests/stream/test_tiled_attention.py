"""Attention, encoder and decoder layers larger than the budget: the right answers, with their projections in tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrowboat as nb
from narrowboat.errors import GradientError, TiledWeightError
from narrowboat.stream.prepare import prepare
from tiles_kit import MIB, ROUNDING, Kit, check, in_a_process, tiles_kit  # noqa: F401

WIDTH = 768  # in-projection 6.8 MiB, output projection 2.3 MiB
HEADS = 8
Factory = Callable[[], nn.Module]


class Attending(nn.Module):
    """Self-attention, or attention to another sequence, with masks and options."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.call = call or {}

    def forward(self, query: torch.Tensor, key: Any = None, value: Any = None, **masks: Any) -> Any:
        key = query if key is None else key
        return self.attention(query, key, key if value is None else value, **self.call, **masks)


class Masked(Attending):
    """Takes its masks by position."""

    def forward(self, query: torch.Tensor, mask: Any = None, padding: Any = None) -> Any:  # type: ignore[override]
        return self.attention(query, query, query, attn_mask=mask, key_padding_mask=padding, **self.call)


def evaluated(make: Factory) -> Factory:
    return lambda: make().eval()


def in_tiles(model: nn.Module, *names: str) -> None:
    """These are in tiles, and what it takes to stream the model is less than any of them as a whole."""
    session = nb.session(model)
    tiled = session.stats()["tiled_layers"]
    assert tiled.keys() >= set(names), tiled
    assert all(tiled[name] > 1 for name in names)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"average_attn_weights": False}])
@pytest.mark.parametrize("traced", [True, False])
def test_self_attention(kit: Kit, batch_first: bool, call: dict[str, Any], traced: bool) -> None:
    x = torch.randn(2, 9, WIDTH)
    model = check(kit, evaluated(lambda: Attending(call, batch_first=batch_first)), x, traced=traced)
    in_tiles(model, "attention.in_proj", "attention.out_proj")
    assert nb.session(model).min_budget < model.attention.in_proj_weight.nbytes


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("shapes", [((5, 2, WIDTH),), ((5, WIDTH),), ((5, 2, WIDTH), (7, 2, WIDTH))])
def test_options_of_attention(kit: Kit, options: dict[str, Any], shapes: tuple[tuple[int, ...], ...]) -> None:
    model = check(kit, evaluated(lambda: Attending(**options)), *(torch.randn(shape) for shape in shapes))
    in_tiles(model, "attention.in_proj")


@pytest.mark.parametrize("batch_first", [True, False])
def test_query_key_and_value_of_their_own(kit: Kit, batch_first: bool) -> None:
    query, key, value = torch.randn(3, 3, WIDTH), torch.randn(3, 3, WIDTH), torch.randn(3, 3, WIDTH)
    check(kit, evaluated(lambda: Attending(batch_first=batch_first)), query, key, value)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False, "add_bias_kv": True, "add_zero_attn": True}])
def test_keys_and_values_of_other_widths(kit: Kit, options: dict[str, Any], traced: bool) -> None:
    query, key, value = torch.randn(4, 2, WIDTH), torch.randn(6, 2, 200), torch.randn(6, 2, 900)
    factory = evaluated(lambda: Attending(kdim=200, vdim=900, **options))
    model = check(kit, factory, query, key, value, traced=traced)
    in_tiles(model, "attention.q_proj", "attention.v_proj")
    assert "attention.k_proj" not in nb.session(model).stats()["tiled_layers"]  # half a mebibyte


MASKS = {
    "2-D bool": (torch.ones(6, 6, dtype=torch.bool).triu(1), None),
    "2-D float": (torch.randn(6, 6), None),
    "3-D bool": (torch.rand(2 * HEADS, 6, 6) > 0.8, None),
    "3-D float": (torch.randn(2 * HEADS, 6, 6), None),
    "padding": (None, torch.tensor([[False] * 6, [False] * 4 + [True] * 2])),
    "float padding": (None, torch.tensor([[0.0] * 6, [0.0] * 4 + [-3.0] * 2])),
    "both": (torch.ones(6, 6, dtype=torch.bool).triu(1), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks(kit: Kit, name: str, need_weights: bool) -> None:
    mask, padding = MASKS[name]
    if mask is not None and mask.dtype is torch.bool and mask.dim() == 3:
        mask[..., 0] = False  # none is masked altogether
    factory = evaluated(lambda: Masked({"need_weights": need_weights}, batch_first=True))
    check(kit, factory, torch.randn(2, 6, WIDTH), mask, padding)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_hint_that_a_mask_is_causal(kit: Kit, need_weights: bool) -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    factory = evaluated(lambda: Masked({"need_weights": need_weights, "is_causal": True}, batch_first=True))
    check(kit, factory, torch.randn(2, 6, WIDTH), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_half_precision(kit: Kit, dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, WIDTH).to(dtype)
    check(kit, evaluated(lambda: Attending({"need_weights": False}, batch_first=True, dtype=dtype)), x)


def test_under_autocast_and_under_no_grad(kit: Kit) -> None:
    torch.manual_seed(0)
    plain, x = Attending(batch_first=True).eval(), torch.randn(2, 6, WIDTH)
    model = kit.stream(evaluated(lambda: Attending(batch_first=True)), kit.at_rest(plain), (x,))
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-2)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_under_autocast_gives_the_dtype_of_the_fast_path(kit: Kit, norm_first: bool) -> None:
    torch.manual_seed(0)
    factory = encoder_layer(norm_first=norm_first)
    plain, x = factory(), torch.randn(2, 6, WIDTH)
    model = kit.stream(factory, kit.at_rest(plain), (x,))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            want, got = plain(x), model(x)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=6e-2)


def encoder_layer(**options: Any) -> Factory:
    settings = {"dim_feedforward": 1500, "batch_first": True} | options
    return evaluated(lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, **settings))


ENCODER_OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm_first": True},
    {"activation": "gelu"},
    {"activation": F.silu, "batch_first": False},
    {"activation": nn.ReLU(), "bias": False},
]


@pytest.mark.parametrize("options", ENCODER_OPTIONS)
@pytest.mark.parametrize("traced", [True, False])
def test_an_encoder_layer(kit: Kit, options: dict[str, Any], traced: bool) -> None:
    model = check(kit, encoder_layer(**options), torch.randn(2, 7, WIDTH), traced=traced)
    in_tiles(model, "self_attn.in_proj", "linear1", "linear2")
    assert nb.session(model).min_budget < model.self_attn.in_proj_weight.nbytes


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("traced", [True, False])
def test_a_decoder_layer(kit: Kit, norm_first: bool, traced: bool) -> None:
    def factory() -> nn.Module:
        return nn.TransformerDecoderLayer(WIDTH, HEADS, 1500, batch_first=True, norm_first=norm_first).eval()

    model = check(kit, factory, torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH), traced=traced)
    in_tiles(model, "self_attn.in_proj", "multihead_attn.in_proj", "linear1", "linear2")
    assert nb.session(model).min_budget < model.self_attn.in_proj_weight.nbytes


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("traced", [True, False])
def test_a_transformer_with_masks(kit: Kit, batch_first: bool, traced: bool) -> None:
    class Translating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Transformer(WIDTH, HEADS, 2, 2, 1500, batch_first=batch_first)

        def forward(self, source: torch.Tensor, target: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
            return self.inner(source, target, tgt_mask=causal, tgt_is_causal=True)

    inputs = torch.randn(4, 4, WIDTH), torch.randn(4, 4, WIDTH), nn.Transformer.generate_square_subsequent_mask(4)
    model = check(kit, evaluated(Translating), *inputs, traced=traced)
    in_tiles(model, "inner.encoder.layers.0.self_attn.in_proj", "inner.decoder.layers.1.multihead_attn.in_proj")


class Padded(nn.Module):
    """An encoder that makes nested tensors of padded batches, which only fused layers take."""

    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 1500, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=nested)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("traced", [True, False])
def test_padding_comes_back_as_plain_gives_it(kit: Kit, nested: bool, traced: bool) -> None:
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] + [True] * 5])
    factory = evaluated(lambda: Padded(nested))
    inputs = torch.randn(3, 6, WIDTH), padding
    torch.manual_seed(0)
    plain: Any = factory()
    with torch.inference_mode():
        want = plain(*inputs)
        assert torch.equal(want[2, 1], want[2, 2]) is nested  # zeros, normalised
    model = kit.stream(factory, kit.at_rest(plain), inputs if traced else None)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(model(*inputs), want, rtol=0, atol=ROUNDING[want.dtype] * want.abs().max())
    in_tiles(model, "encoder.layers.0.self_attn.in_proj", "encoder.layers.1.linear1")


def test_nested_tensors_given_by_hand(kit: Kit) -> None:
    torch.manual_seed(0)
    plain: Any = Attending(batch_first=True).eval()
    rows = [torch.randn(5, WIDTH), torch.randn(3, WIDTH)]
    model = kit.stream(evaluated(lambda: Attending(batch_first=True)), kit.at_rest(plain), None)
    with torch.inference_mode():
        nested = torch.nested.as_nested_tensor(rows)
        (got, weights), (want, wanted) = model(nested), plain(nested)
        for a, b in zip(got.unbind(), want.unbind(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(weights[0], wanted[0], rtol=0, atol=1e-6)


class Unequal(nn.Module):
    """Encoder layers of which some are worth tiles and some are not."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
        self.up = nn.Linear(64, WIDTH)
        self.large = nn.TransformerEncoderLayer(WIDTH, HEADS, 1500, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.small(x)
        return first, self.large(self.up(first))


def test_layers_that_are_left_whole_stay_on_the_fast_path(kit: Kit) -> None:
    torch.manual_seed(0)
    plain, x = Unequal().eval(), torch.randn(2, 9, 64)
    model = check(kit, evaluated(Unequal), x)
    in_tiles(model, "large.self_attn.in_proj")
    torch.manual_seed(0)
    plain = Unequal().eval()
    with torch.inference_mode():
        assert torch.equal(model(x)[0], plain(x)[0])


def test_a_budget_that_holds_the_layers_leaves_them_whole_with_plain_bits(kit: Kit) -> None:
    factory = evaluated(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 1500, batch_first=True), 2)
    )
    torch.manual_seed(0)
    plain, x = factory(), torch.randn(2, 7, WIDTH)
    path = kit.at_rest(plain)
    whole, _ = prepare(factory, path, ((x,), {})).check(1 << 40)
    least = kit.least(factory, path, (x,))
    assert least < whole - 8 * MIB
    for budget in (whole, whole + 20 * MIB, "256MiB"):
        model = nb.stream(factory, path, budget=budget, example=(x,))
        kit.opened.append(model)
        session = nb.session(model)
        assert session.stats()["tiled_layers"] == {} and session.min_budget == least
        with torch.inference_mode():
            for _ in range(2):
                assert torch.equal(model(x), plain(x))
        session.close()


def test_one_token_gets_the_very_bits_of_plain_pytorch_without_its_fast_path(kit: Kit) -> None:
    torch.manual_seed(0)
    factory = encoder_layer()
    plain, x = factory(), torch.randn(1, 1, WIDTH)
    model = kit.stream(factory, kit.at_rest(plain), (x,))
    in_tiles(model, "self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    with torch.inference_mode():
        got = model(x)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert torch.equal(got, plain(x))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_a_query_that_sees_nothing_gets_zeros(kit: Kit) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2] = True
    factory = evaluated(lambda: Masked({"need_weights": False}, batch_first=True, bias=False))
    x = torch.randn(1, 4, WIDTH)
    model = kit.stream(factory, kit.at_rest(factory()), (x, mask))
    with torch.inference_mode():
        assert torch.equal(model(x, mask)[0][0, 2], torch.zeros(WIDTH))


def test_a_live_budget_grows_and_shrinks(kit: Kit) -> None:
    torch.manual_seed(0)
    factory = encoder_layer()
    plain, x = factory(), torch.randn(2, 7, WIDTH)
    model = kit.stream(factory, kit.at_rest(plain), (x,), more=MIB)
    session = nb.session(model)
    with torch.inference_mode():
        want = model(x)
        torch.testing.assert_close(want, plain(x), rtol=0, atol=1e-5)
        session.budget = "64MiB"
        assert torch.equal(model(x), want) and torch.equal(model(x), want)
        assert session.stats()["bytes_read"][-1] == 0
        floor, _ = session.prepared.check(1 << 40)
        session.budget = floor
        assert torch.equal(model(x), want) and torch.equal(model(x), want)


def test_closing_lets_the_layers_take_their_fast_path_again(kit: Kit) -> None:
    torch.manual_seed(0)
    factory = encoder_layer()
    plain, x = factory(), torch.randn(2, 7, WIDTH)
    path = kit.at_rest(plain)
    model = kit.stream(factory, path, (x,))
    nb.session(model).close()
    again = nb.stream(model, path, budget="64MiB", example=(x,))
    kit.opened.append(again)
    with torch.inference_mode():
        assert torch.equal(again(x), plain(x))


def test_the_weight_cannot_be_had_as_a_whole(kit: Kit) -> None:
    plain = Attending(batch_first=True).eval()
    model = kit.stream(evaluated(lambda: Attending(batch_first=True)), kit.at_rest(plain), (torch.randn(1, 3, WIDTH),))
    weight = model.attention.in_proj_weight
    assert weight.shape == (3 * WIDTH, WIDTH) and isinstance(weight, nn.Parameter)
    for touch in (lambda: weight.sum(), lambda: weight.chunk(3), lambda: weight[0]):
        with pytest.raises(TiledWeightError, match=r"'attention\.in_proj_weight' .* tiles"):
            touch()
    assert [name for name, _ in model.named_parameters()] == list(plain.state_dict())


class Sideways(nn.Module):
    """Uses the in-projection of an attention without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.attention.in_proj_weight)


def test_a_projection_used_elsewhere_is_left_whole_if_that_is_known_and_else_refused(kit: Kit) -> None:
    plain, x = Sideways(), torch.randn(1, WIDTH)
    path = kit.at_rest(plain)
    model = kit.stream(Sideways, path, (x,))
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    assert "attention.in_proj" not in nb.session(model).stats()["tiled_layers"]
    nb.session(model).close()
    model = kit.stream(Sideways, path, None)
    with torch.inference_mode(), pytest.raises(TiledWeightError, match=r"in_proj_weight.*example inputs"):
        model(x)


class OwnAttention(nn.MultiheadAttention):
    """Somebody's own."""


class OwnLayer(nn.TransformerEncoderLayer):
    """Somebody's own."""


@pytest.mark.parametrize("traced", [True, False])
def test_subclasses_are_left_whole(kit: Kit, traced: bool) -> None:
    for factory in (
        evaluated(lambda: OwnAttention(WIDTH, HEADS, batch_first=True)),
        evaluated(lambda: OwnLayer(WIDTH, HEADS, 1500, batch_first=True)),
    ):
        plain: Any = factory()
        x = (torch.randn(2, 5, WIDTH),) * (3 if isinstance(plain, nn.MultiheadAttention) else 1)
        model = kit.stream(factory, kit.at_rest(plain), x if traced else None)
        assert nb.session(model).stats()["tiled_layers"] == {}
        with torch.inference_mode():
            got, want = model(*x), plain(*x)
            assert torch.equal(got[0], want[0])
        nb.session(model).close()


@pytest.mark.parametrize("traced", [True, False])
def test_two_attentions_that_share_a_projection(kit: Kit, traced: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))
            self.two.in_proj_weight = self.one.in_proj_weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x, x, x)[0]
            return self.two(x, x, x)[0]

    model = check(kit, evaluated(Tied), torch.randn(2, 5, WIDTH), traced=traced)
    in_tiles(model, "one.in_proj", "two.in_proj")
    assert model.one.in_proj_weight is model.two.in_proj_weight


def test_queries_that_are_a_weight(kit: Kit) -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(4, 1, WIDTH))
            self.attention = nn.MultiheadAttention(WIDTH, HEADS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(self.queries, x, x)[0]

    check(kit, evaluated(Pooling), torch.randn(6, 1, WIDTH))


def test_gradients_are_refused(kit: Kit) -> None:
    x = torch.randn(1, 3, WIDTH)
    plain = Attending(batch_first=True).eval()
    path = kit.at_rest(plain)
    model = kit.stream(evaluated(lambda: Attending(batch_first=True)), path, (x,))
    with pytest.raises(GradientError):
        model(x)
    nb.session(model).close()
    frozen = kit.stream(evaluated(lambda: Attending(batch_first=True).requires_grad_(False)), path, (x,))
    assert not frozen(x)[0].requires_grad


def test_many_inputs_per_sweep(kit: Kit) -> None:
    torch.manual_seed(0)
    factory = evaluated(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 1500, batch_first=True), 6)
    )
    plain = factory()
    inputs = [torch.randn(1, 6, WIDTH) for _ in range(5)]
    path = kit.at_rest(plain)
    whole, _ = prepare(factory, path, ((inputs[0],), {})).check(1 << 40)
    model = nb.stream(factory, path, budget=whole - 1, example=(inputs[0],))
    kit.opened.append(model)
    in_tiles(model, "layers.0.self_attn.in_proj")
    with torch.inference_mode():
        model(inputs[0])
    with torch.inference_mode():
        for got, x in itertools.zip_longest(nb.session(model).map(inputs), inputs):
            torch.testing.assert_close(got, plain(x), rtol=0, atol=1e-5)


SETUP = """
def factory():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True), 1).eval()
torch.manual_seed(1)
x = torch.randn(1, 64, 2048)
"""


def test_a_process_stays_within_a_budget_a_third_of_its_in_projection(kit: Kit) -> None:
    torch.manual_seed(0)

    def factory() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True), 1).eval()

    plain: Any = factory()
    path = kit.at_rest(plain)
    torch.manual_seed(1)
    x = torch.randn(1, 64, 2048)
    least = kit.least(factory, path, (x,))  # the trace is kept, and the child finds it: its tracer stays out
    budget = 20 * MIB
    assert least < budget
    assert plain.layers[0].self_attn.in_proj_weight.nbytes > 2 * budget
    with torch.inference_mode():
        want = plain(x)[0, 0, :64]
    told = in_a_process(path, budget, SETUP, "answer[0, 0, :64]")
    assert told["tiled"].keys() >= {"layers.0.self_attn.in_proj", "layers.0.linear1"}
    assert told["over_baseline"] <= budget, told
    torch.testing.assert_close(torch.tensor(told["answer"]), want, rtol=0, atol=1e-5)
