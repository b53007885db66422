"""Models cut into parts, without a cluster: the same bits, only their own weights, and what cannot be cut."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import narrowboat as nb
import pipeline_kit as kit
from narrowboat.cluster.pipeline.message import pack, unpack
from narrowboat.cluster.pipeline.part import Part
from narrowboat.cluster.pipeline.program import Program
from narrowboat.cluster.pipeline.record import record, units
from narrowboat.cluster.pipeline.survey import study, weights_identity
from narrowboat.errors import ModelError, WeightsMismatchError, WeightsNotFoundError
from narrowboat.profile import build_skeleton

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "vit": (kit.vit, (kit.image(),), {}),
    "resnet": (kit.resnet, (kit.image(),), {}),
    "bert": (kit.bert, (), {"input_ids": kit.ids(), "attention_mask": (kit.ids() > 20).long()}),
    "gpt": (kit.gpt, (kit.ids(),), {}),
    "llama": (kit.llama, (kit.ids(),), {"use_cache": False}),
    "skips": (kit.Skips, (torch.ones(3, 32),), {}),
}


def same(one: Any, other: Any) -> bool:
    """Equal bits, structure and classes."""
    flat, tree = tree_flatten(one)
    others, other_tree = tree_flatten(other)
    return tree == other_tree and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(flat, others, strict=True)
    )


def across(program: Program, parts: list[Callable[..., Any]], takes: list[tuple[int, ...]], given: list[Any]) -> Any:
    """Run parts one after the other, with a message at each cut."""
    values = given
    for part, slots in zip(parts, takes, strict=True):
        there = unpack(pack(dict(zip(slots, values, strict=True))))
        values = part(*(there[slot] for slot in slots))
    return program.result(values)


@pytest.mark.parametrize("name", MODELS)
def test_cut_at_every_call_the_bits_are_the_same(name: str) -> None:
    factory, args, kwargs = MODELS[name]
    torch.manual_seed(0)
    module = factory()
    program = record(build_skeleton(factory), args, kwargs)
    count = len(program.instructions)
    calls = [at for at, instruction in enumerate(program.instructions) if instruction.is_module]
    with torch.inference_mode():
        want = module(*args, **kwargs)
        for cuts in ([0, count], [0, *calls[1::3], count], [0, *calls[1:], count]):
            parts = [Part(program, module, a, b) for a, b in pairwise(cuts)]
            got = across(program, parts, [part.takes for part in parts], program.tensors_of(args, kwargs))
            assert same(want, got)


@pytest.mark.parametrize("name", ["vit", "resnet", "gpt", "llama"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_streamed_parts_read_their_own_weights_and_give_the_same_bits(name: str, packed: bool, tmp_path: Path) -> None:
    factory, args, kwargs = MODELS[name]
    module, path = kit.made(factory, tmp_path, packed=packed)
    example = kwargs | {"input_ids": args[0]} if kwargs else args
    model = study(factory, str(path), example)
    pieces = len(model.chain.pieces)
    assert pieces >= 4
    cuts = [0, pieces // 3, 2 * pieces // 3, pieces]
    streamed, takes, owns = [], [], []
    for begin, end in pairwise(cuts):
        part = model.part(begin, end)
        owned = sum(p.numel() * p.element_size() for p in {*part.parameters(), *part.buffers()})
        facts = model.program.facts
        shapes = tuple(torch.zeros(facts[slot].shape, dtype=facts[slot].dtype) for slot in part.takes)
        takes.append(part.takes)
        made = nb.stream(part, model.index, budget="60MiB", example=shapes, strict=False)
        streamed.append(made)
        owns.append(owned)
        # Each weight lies in one part, but for one that two parts use.
        assert owned < 0.75 * model.index.total_bytes
    assert sum(owns) <= model.index.total_bytes * (1.35 if name == "gpt" else 1.01)
    try:
        with torch.inference_mode():
            want = module(*args, **kwargs)
            flat = model.program.tensors_of(args, kwargs) if not kwargs else model.tensors
            assert same(want, across(model.program, streamed, takes, flat))
            # As tight as can be without tiles, so that what does not fit is streamed in every pass.
            for part in streamed:
                nb.session(part).budget = nb.session(part).prepared.check(1 << 40)[0]
            assert any(nb.session(part).plan.streamed for part in streamed)
            before = [nb.session(part).reader.bytes_read for part in streamed]
            assert same(want, across(model.program, streamed, takes, flat))
            for part, had, own in zip(streamed, before, owns, strict=True):
                assert nb.session(part).reader.bytes_read - had <= own * 2 + (1 << 20)
    finally:
        for part in streamed:
            nb.session(part).close()


def test_what_is_used_again_later_travels_along_and_counts() -> None:
    program = record(build_skeleton(kit.Skips), (torch.ones(3, 32),), {})
    calls = [at for at, instruction in enumerate(program.instructions) if instruction.is_module]
    between = program.crossing(calls[2])
    assert program.bytes_of(between) == 2 * 3 * 32 * 4  # the early tensor and the running one, the view for nothing
    assert len({program.facts[slot].storage for slot in between}) == 2


def test_a_message_keeps_views_strides_and_shared_memory() -> None:
    base = torch.arange(240.0).reshape(12, 20)
    given = {1: base.t()[3:], 2: base[2:5, ::3], 3: torch.ones(2, dtype=torch.bool), 4: torch.empty(0, 3)}
    got = unpack(pack(given))
    for slot, tensor in given.items():
        assert torch.equal(got[slot], tensor)
        assert got[slot].stride() == tensor.stride()
    got[1].zero_()
    assert got[2].abs().sum() < given[2].abs().sum()


def test_a_message_carries_the_part_of_a_storage_that_is_used() -> None:
    large = torch.zeros(1000, 1000)
    assert pack({0: large[500:501]}).nbytes < 8192


@pytest.mark.parametrize(
    ("factory", "args", "kwargs", "why"),
    [
        (kit.Decides, (torch.ones(8),), {}, "depends on the values of tensors"),
        (kit.Counts, (torch.ones(8),), {}, "writes to calls"),
        (kit.Draws, (torch.ones(8),), {}, r"draws random numbers .*\.eval\(\)"),
        (kit.llama, (kit.ids(),), {}, "DynamicCache.*use_cache=False"),
    ],
    ids=["decides", "counts", "draws", "cache"],
)
def test_what_cannot_be_cut_says_why(
    factory: Callable[[], nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelError, match=f"cannot be parted into stages: .*{why}"):
        record(build_skeleton(factory), args, kwargs)


def test_a_class_that_is_not_to_be_split_is_called_whole() -> None:
    skeleton = build_skeleton(kit.llama)
    assert "model.layers.0" in units(skeleton, ["LlamaDecoderLayer"])
    program = record(skeleton, (kit.ids(),), {"use_cache": False}, no_split=["LlamaDecoderLayer"])
    assert program.modules(0, len(program.instructions))[2:8] == [f"model.layers.{i}" for i in range(6)]


def test_a_program_is_told_from_another() -> None:
    x = (kit.ids(),)
    one, again = (record(build_skeleton(kit.gpt), x, {}).digest() for _ in range(2))
    assert one == again
    assert one != record(build_skeleton(kit.gpt), (kit.ids(shape=(2, 8)),), {}).digest()


def test_weights_are_told_from_others_and_missed(tmp_path: Path) -> None:
    from narrowboat.checkpoint import open_index

    first, plain = kit.made(kit.gpt, tmp_path, packed=False)
    identity = weights_identity(open_index(plain))
    assert identity == weights_identity(open_index(plain))
    torch.manual_seed(99)
    from safetensors.torch import save_model

    save_model(kit.gpt(), str(tmp_path / "other.safetensors"))
    assert identity != weights_identity(open_index(tmp_path / "other.safetensors"))
    with pytest.raises(WeightsNotFoundError):
        study(kit.gpt, str(tmp_path / "none.safetensors"), (kit.ids(),))
    with pytest.raises(WeightsMismatchError):
        study(kit.vit, str(plain), (kit.image(),))
    del first
