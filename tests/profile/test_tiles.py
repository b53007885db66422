"""Cutting layers: every row once, at page boundaries where possible; who qualifies; what a trace becomes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import narrowboat as nb
from narrowboat.checkpoint import open_index
from narrowboat.profile.skeleton import Matched, build_skeleton, match_weights, streamed_modules
from narrowboat.profile.slices import PAGE, UNITS, row_slices
from narrowboat.profile.tiled_forward import CUT, Cut, convolution_forward
from narrowboat.profile.tiled_trace import expand, plan_strips
from narrowboat.profile.tiles import install, plan_tiles, tileable, uninstall
from narrowboat.profile.unfused_trace import unfuse_trace
from narrowboat.profile.use_trace import ENTER, UseTrace, trace_uses

MIB = 1 << 20


@given(st.integers(1, 5000), st.integers(1, 20_000), st.integers(1, 4 << 20), st.sampled_from([1, 1, 2, 3, 48]))
@settings(max_examples=300, deadline=None)
def test_slices_cover_every_row_once_and_keep_the_limit(rows: int, row_bytes: int, limit: int, multiple: int) -> None:
    slices = row_slices(rows, row_bytes, limit, multiple=multiple)
    assert slices[0][0] == 0 and slices[-1][1] == rows
    assert all(before[1] == after[0] for before, after in pairwise(slices))
    assert all(stop > start for start, stop in slices)
    assert all(start % multiple == 0 for start, _ in slices)
    assert all((stop - start) * row_bytes <= max(limit, multiple * row_bytes) for start, stop in slices)


@given(st.integers(1, 3000), st.sampled_from([4, 64, 300, 1200, 4096, 4100, 9216]), st.integers(1 << 14, 4 << 20))
@settings(max_examples=200, deadline=None)
def test_slices_begin_on_pages_where_the_limit_allows(rows: int, row_bytes: int, limit: int) -> None:
    aligned = next(r for r in range(1, PAGE + 1) if r * row_bytes % PAGE == 0)
    slices = row_slices(rows, row_bytes, limit)
    if aligned * row_bytes <= limit:
        assert all(start * row_bytes % PAGE == 0 for start, _ in slices)
    if max(UNITS) * aligned * row_bytes <= limit:
        assert all(start % max(UNITS) == 0 for start, _ in slices)


class Mixed(nn.Module):
    """Layers that can be cut, and weights that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9000, 64)
        self.a = nn.Linear(64, 6000)
        self.b = nn.Linear(6000, 64, bias=False)
        self.read_as_data = nn.Linear(64, 6000)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.normed = nn.Embedding(9000, 64, max_norm=1.0)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        x = self.table(indices)
        x = self.b(torch.relu(self.a(x)))
        x = x + F.linear(x, self.read_as_data.weight)[..., :64]
        return self.attention(x, x, x)[0]


def kit(factory: Any, folder: Path, *example: Any) -> tuple[nn.Module, Matched, UseTrace]:
    nb.pack(factory().state_dict(), folder / "w.safetensors")
    module = build_skeleton(factory)
    matched = match_weights(module, open_index(folder / "w.safetensors"))
    return module, matched, trace_uses(module, matched.numbers, example, {})


def test_only_weights_that_their_own_layer_alone_uses_qualify(tmp_path: Path) -> None:
    module, matched, trace = kit(Mixed, tmp_path, torch.zeros(1, 5, dtype=torch.long))
    found = {
        matched.weights[w].name for w in tileable(module, matched, trace) if matched.weights[w].entry.nbytes > MIB
    }
    assert found == {"table.weight", "a.weight", "b.weight"}
    untraced = tileable(module, matched, None)
    assert "normed.weight" not in {matched.weights[w].name for w in untraced}


def test_an_expanded_trace_has_a_step_for_every_tile_and_keeps_the_others(tmp_path: Path) -> None:
    module, matched, trace = kit(Mixed, tmp_path, torch.zeros(1, 5, dtype=torch.long))
    tiling = plan_tiles(module, matched, tileable(module, matched, trace), 512 << 10)
    assert tiling is not None
    after = expand(trace, tiling, module)
    tiles = [t for layer in tiling.layers for t in layer.tiles]
    assert sum(tiling.weights[t].entry.nbytes for t in tiles) == 2 * 6000 * 64 * 4
    for tile in tiles:
        steps = [i for i, used in enumerate(after.uses) if tile in used]
        assert len(steps) == 1 and after.uses[steps[0]] == [tile] and after.events[steps[0]][1] == ENTER
    wholes = {layer.whole for layer in tiling.layers}
    assert not any(wholes & set(used) for used in after.uses)
    others = [w for step in trace.uses for w in step if w not in wholes]
    assert [w for step in after.uses for w in step if w not in set(tiles)] == others
    assert len({len(x) for x in (after.events, after.uses, after.flops, after.traffic, after.peaks)}) == 1
    assert sum(after.flops) == pytest.approx(sum(trace.flops))


class Attentive(nn.Module):
    """Two encoder layers, one of them large, and an attention to their result."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.TransformerEncoderLayer(96, 4, 128, batch_first=True)
        self.up = nn.Linear(96, 384)
        self.large = nn.TransformerEncoderLayer(384, 4, 768, batch_first=True)
        self.attention = nn.MultiheadAttention(384, 4, batch_first=True, add_bias_kv=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.large(self.up(self.small(x)))
        return self.attention(x[:, :2], x, x)[0]


def attentive(folder: Path) -> tuple[nn.Module, Matched, UseTrace, UseTrace]:
    x = torch.zeros(1, 5, 96)
    module, matched, trace = kit(lambda: Attentive().eval(), folder, x)
    return module, matched, trace, trace_uses(module, matched.numbers, (x,), {}, unfused=True)


def test_weights_of_fused_layers_qualify_where_it_is_known_what_they_do_unfused(tmp_path: Path) -> None:
    module, matched, trace, unfused = attentive(tmp_path)
    inside = {"large.self_attn.in_proj_weight", "large.linear2.weight", "attention.out_proj.weight"}
    assert not inside & {matched.weights[w].name for w in tileable(module, matched, trace)}
    for known in (tileable(module, matched, trace, unfused), tileable(module, matched, None)):
        names = {matched.weights[w].name for w in known}
        assert names >= inside and "large.self_attn.in_proj_bias" not in names and "attention.bias_k" not in names


def test_only_the_layers_that_are_cut_go_step_by_step_in_a_trace(tmp_path: Path) -> None:
    module, _, trace, unfused = attentive(tmp_path)
    numbers = {name: number for number, (name, _) in enumerate(module.named_modules())}
    assert unfuse_trace(trace, unfused, module, ()) is trace
    both = unfuse_trace(trace, unfused, module, [numbers["small"], numbers["large"], numbers["attention"]])
    assert (both.events, both.uses, both.peaks, both.alive) == (
        unfused.events,
        unfused.uses,
        unfused.peaks,
        unfused.alive,
    )
    one = unfuse_trace(trace, unfused, module, [numbers["large"]])
    entered = {number for number, kind in one.events if kind == ENTER}
    assert numbers["large.linear1"] in entered and numbers["small.linear1"] not in entered
    assert set(one.execution_order()) == set(both.execution_order())


def test_an_attention_in_tiles_has_a_step_for_each_and_keeps_its_other_weights(tmp_path: Path) -> None:
    module, matched, trace, unfused = attentive(tmp_path)
    tiling = plan_tiles(module, matched, tileable(module, matched, trace, unfused), 256 << 10)
    assert tiling is not None
    numbers = {name: number for number, (name, _) in enumerate(module.named_modules())}
    assert set(tiling.unfused) == {numbers[n] for n in ("large", "large.self_attn", "attention")}
    cut = {layer.name: layer for layer in tiling.layers}
    assert all(start // 384 == (stop - 1) // 384 for start, stop in cut["attention.in_proj"].slices)
    before = unfuse_trace(trace, unfused, module, tiling.unfused)
    after = expand(before, tiling, module)
    for tile in (t for layer in tiling.layers for t in layer.tiles):
        steps = [i for i, used in enumerate(after.uses) if tile in used]
        assert len(steps) == 1 and after.uses[steps[0]] == [tile] and after.events[steps[0]][1] == ENTER
    wholes = {layer.whole for layer in tiling.layers}
    used = {w for step in after.uses for w in step}
    assert not wholes & used
    assert {w for step in before.uses for w in step} - wholes == used - {t for x in tiling.layers for t in x.tiles}
    assert sum(after.flops) == pytest.approx(sum(before.flops))
    assert after.activation_bytes >= before.activation_bytes
    assert len({len(x) for x in (after.events, after.uses, after.flops, after.peaks, after.alive)}) == 1


def test_installing_leaves_the_tree_as_it_was_and_uninstalling_the_module(tmp_path: Path) -> None:
    module, matched, trace = kit(Mixed, tmp_path, torch.zeros(1, 5, dtype=torch.long))
    before = [name for name, _ in module.named_modules()], [name for name, _ in module.named_parameters()]
    tiling = plan_tiles(module, matched, tileable(module, matched, trace), 512 << 10)
    assert tiling is not None
    numbers = dict(matched.numbers)
    install(module, tiling, numbers, None)  # type: ignore[arg-type]
    assert ([name for name, _ in module.named_modules()], [name for name, _ in module.named_parameters()]) == before
    tiles = sum(len(layer.tiles) for layer in tiling.layers)
    assert len(list(streamed_modules(module))) == len(before[0]) + tiles
    assert len(numbers) == len(matched.numbers) + tiles
    uninstall(module, tiling)
    assert len(list(streamed_modules(module))) == len(before[0])
    assert not any("forward" in child.__dict__ for child in module.modules())


@pytest.mark.parametrize("strips", [2, 3, 8, 100])
@pytest.mark.parametrize("options", [{}, {"padding": 2}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}])
def test_strips_of_a_convolution_make_every_row_of_its_output(options: dict[str, int], strips: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, **options)
    x = torch.randn(2, 8, 41, 23)
    layer.__dict__[CUT] = Cut((), strips)
    with torch.inference_mode():
        want, got = layer(x), convolution_forward(layer, x)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_strips_are_for_convolutions_whose_workspace_sets_the_peak(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.MaxPool2d(8))

    module, matched, trace = kit(factory, tmp_path, torch.zeros(1, 3, 256, 256))
    strips = plan_strips(module, trace, trace.activation_bytes * 6 // 10)
    assert list(strips) == [2]
    tiling = plan_tiles(module, matched, {}, 1 << 40, strips)
    assert tiling is not None
    after = expand(trace, tiling, module)
    assert after.events == trace.events and after.uses == trace.uses
    assert after.activation_bytes < trace.activation_bytes * 0.75
