"""The same bits from every kind of weights file at every budget, and what the session tells about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import narrowboat as nb
from narrowboat.stream.stats import collect

MIB = 1 << 20


def packed(state: dict[str, torch.Tensor], folder: Path) -> Path:
    nb.pack(state, folder / "packed.safetensors")
    return folder / "packed.safetensors"


def unpacked(state: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(state, folder / "plain.safetensors")
    return folder / "plain.safetensors"


def pth(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def sharded(state: dict[str, torch.Tensor], folder: Path) -> Path:
    names = list(state)
    weight_map = {}
    for number in range(3):
        part = {name: state[name] for name in names[number::3]}
        file = f"model-{number + 1:05}-of-00003.safetensors"
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def folder(state: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder


WRITERS = [packed, unpacked, pth, sharded, folder]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.parametrize("extra", [0, MIB, 64 * MIB], ids=["smallest", "middling", "everything"])
@pytest.mark.parametrize("traced", [True, False], ids=["example", "first call"])
def test_every_kind_of_file_gives_the_same_bits(
    tmp_path: Path, deep: Any, writer: Callable[..., Path], extra: int, traced: bool
) -> None:
    path = writer(deep.plain.state_dict(), tmp_path)
    budget = deep.least(deep.net, path, deep.x) + extra
    model = deep.stream(path=path, budget=budget, example=(deep.x,) if traced else None)
    assert deep.right(model, 5)
    deep.assert_state(model.state_dict())
    stats = nb.session(model).stats()
    assert (stats["copied_bytes"] > 0) == (writer is not packed and stats["direct_io"])
    if traced:
        assert stats["misses"] == 0
        assert stats["off_trace_passes"] == 0


@pytest.mark.parametrize("io", ["direct", "buffered", "auto"])
def test_every_way_of_reading_gives_the_same_bits(deep: Any, io: str) -> None:
    model = deep.stream(io=io)
    assert deep.right(model, 3)
    if io != "auto":
        assert nb.session(model).direct_io == (io == "direct")


def test_direct_io_that_cannot_be_had_is_refused_when_asked_for(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real = os.open

    def refusing(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(nb.NarrowboatError, match="io='auto'"):
        deep.stream(io="direct")
    model = deep.stream()
    assert deep.right(model)
    assert nb.session(model).stats()["direct_io_refusal"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_the_same_bits(tmp_path: Path, deep: Any, dtype: torch.dtype) -> None:
    def factory() -> nn.Module:
        return deep.net().to(dtype)

    torch.manual_seed(1)
    plain = factory().eval()
    x = deep.x.to(dtype)
    nb.pack(plain.state_dict(), tmp_path / "w.safetensors")
    model = deep.stream(
        factory, tmp_path / "w.safetensors", example=(x,), budget=deep.least(factory, tmp_path / "w.safetensors", x)
    )
    with torch.inference_mode():
        want = plain(x)
        assert all(torch.equal(model(x), want) for _ in range(3))
    assert model.head.weight.dtype == dtype


def test_other_input_shapes_than_the_examples_are_right(deep: Any) -> None:
    model = deep.stream()
    with torch.inference_mode():
        for rows in (1, 3, 8, 2):
            x = torch.randn(rows, 256)
            assert torch.equal(model(x), deep.plain(x))


def test_the_documented_statistics_are_the_ones_there_are(deep: Any) -> None:
    model = deep.stream()
    assert deep.right(model, 4)
    stats = nb.session(model).stats()
    table = re.findall(r"^ {4}([a-z_]+) {2,}\S", collect.__doc__ or "", re.MULTILINE)
    documented = [key for key in table if key != "key"]
    extra = {"fixed_parts"}  # told of under fixed_bytes
    assert set(documented) | extra == set(stats) | extra
    json.dumps(stats)


def test_statistics_count_what_happened(deep: Any) -> None:
    model = deep.stream()
    session = nb.session(model)
    assert session.stats()["passes"] == 0
    assert session.stats()["median_latency_ms"] is None
    assert deep.right(model, 4)
    stats = session.stats()
    assert stats["passes"] == len(stats["latency_ms"]) == len(stats["stall_ms"]) == len(stats["bytes_read"]) == 4
    for latency, stall, compute in zip(stats["latency_ms"], stats["stall_ms"], stats["compute_ms"], strict=True):
        assert 0 <= stall <= latency
        assert compute == pytest.approx(latency - stall)
    assert stats["budget_bytes"] == session.budget == deep.minimum
    assert stats["min_budget_bytes"] == session.min_budget <= deep.minimum
    assert stats["held_bytes"] == {"window": session.plan.window_bytes}
    assert stats["fixed_bytes"] + stats["resident_bytes"] + stats["window_bytes"] <= deep.minimum
    # All of it streams: every pass reads every byte, less what the wrap into the next pass has brought in before.
    assert sum(stats["bytes_read"]) >= 3 * (stats["weight_bytes"] - stats["window_bytes"])
    assert set(stats["block_stall_ms"]) <= {block.name for block in session.plan.blocks}


def test_all_resident_reads_once(deep: Any) -> None:
    model = deep.stream(budget=64 * MIB)
    assert deep.right(model, 5)
    stats = nb.session(model).stats()
    assert sum(stats["bytes_read"]) <= stats["weight_bytes"]
    assert stats["bytes_read"][-3:] == [0, 0, 0]
    assert stats["stall_ms"][-1] == 0


def test_the_timeline_shows_reads_computing_and_waiting(tmp_path: Path, deep: Any) -> None:
    model = deep.stream()
    assert deep.right(model, 2)
    trace = nb.session(model).trace()
    lanes = {event.lane for event in trace.events()}
    assert {"read", "compute"} <= lanes <= {"read", "compute", "stall"}
    trace.save_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) > len(trace.events())


def test_arguments_go_through_by_identity(tmp_path: Path, deep: Any) -> None:
    class Shares(nn.Module):
        """Layers that pass notes to one another in one dict, and give back what they were given."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, notes: dict[str, Any], *, same: Any = None) -> Any:
            notes["a"] = self.a(x)
            notes["b"] = self.b(notes["a"])
            return notes, same

    nb.pack(Shares().state_dict(), tmp_path / "w.safetensors")
    x = torch.zeros(1, 8)
    model = deep.stream(Shares, tmp_path / "w.safetensors", budget=16 * MIB, example=(x, {}))
    notes: dict[str, Any] = {}
    marker = object()
    with torch.inference_mode():
        got, same = model(x, notes, same=marker)
    assert got is notes
    assert same is marker
    assert set(notes) == {"a", "b"}
    assert isinstance(model, Shares)
