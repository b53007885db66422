"""``session.map``: plain PyTorch's bits for every input, in order, with one reading of the weights per group."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrowboat as nb
from interrupt_kit import Interrupter
from narrowboat.errors import (
    BudgetError,
    GradientError,
    MapError,
    SessionClosedError,
    UsageError,
)
from narrowboat.profile import memory

MIB = 1 << 20


@pytest.fixture(autouse=True)
def light_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models have small budgets, in which threads' stacks and buffers would be all there is."""
    monkeypatch.setattr(memory, "_PER_WORKER", 0)
    monkeypatch.setattr(memory, "_PER_TEAM_THREAD", 0)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert map_threads() == []


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; a job in a shell's background inherits that it is ignored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def map_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("narrowboat-map")]


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's result; fails if it hangs."""
    found: list[tuple[Any, BaseException | None]] = []

    def guarded() -> None:
        try:
            found.append((call(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "hangs"
    value, error = found[0]
    if error is not None:
        raise error
    return value


def leaves(value: Any) -> list[torch.Tensor]:
    found, _ = torch.utils._pytree.tree_flatten(value)
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


def same(ours: Any, plain: Any) -> bool:
    a, b = leaves(ours), leaves(plain)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) or bool(x.isnan().any()) for x, y in zip(a, b, strict=True))


def call(model: nn.Module, item: Any) -> Any:
    if isinstance(item, dict):
        return model(**item)
    return model(*item) if isinstance(item, tuple) else model(item)


# -- the same bits ------------------------------------------------------------------------------------------------


def cnn() -> nn.Module:
    def unit(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

    return nn.Sequential(unit(3, 16), unit(16, 16), nn.MaxPool2d(2), unit(16, 32), unit(32, 32), nn.Flatten(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(6)])
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(24, 24, num_layers=2, batch_first=True)
        self.second = nn.GRU(24, 24, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)[0])[0])


class Routed(nn.Module):
    """Runs its layers in whatever order an input asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(8)])

    def forward(self, x: torch.Tensor, route: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
        for i in route:
            x = torch.tanh(self.layers[i](x))
        return x


class Branching(nn.Module):
    """Leaves early, or takes another way, depending on the values: cannot be traced without running."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(8)])
        self.other = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if i == 3 and x.sum() > 0:
                x = self.other(x)
            if i == 5 and x[0, 0] > 0:
                return x
        return x


def images() -> list[Any]:
    return [(torch.randn(n, 3, 16, 16),) for n in (1, 1, 2, 1, 3, 1, 1, 2, 1, 1)]


def tokens() -> list[Any]:
    return [torch.randint(0, 64, (1, n)) for n in (5, 5, 7, 5, 2, 5, 5, 9, 5)]


def series(width: int) -> list[Any]:
    return [torch.randn(1, n, width) for n in (6, 6, 6, 3, 6, 8, 6, 6, 1)]


def routes() -> list[Any]:
    x = torch.randn
    ways = [tuple(range(8)), (0, 1, 2), (0, 3, 4, 7), (5, 6), (7, 6, 5, 4), (0, 1, 1, 1, 2, 3), (0, 2, 1, 3, 7, 0)]
    ways += [(3,), tuple(range(8)), (0, 1, 2, 3, 4, 7), (7,), (6, 7, 0), tuple(range(8))]
    return [{"x": x(2, 32), "route": way} for way in ways]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "convolutions": (cnn, images),
    "tied weights": (Tied, tokens),
    "fused attention": (encoder, lambda: series(32)),
    "recurrent": (Recurrent, lambda: series(24)),
    "routed": (Routed, routes),
    "data-dependent": (Branching, lambda: [torch.randn(1, 32) for _ in range(16)]),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_input_has_the_bits_of_a_plain_pass(name: str, threads: int, tmp_path: Path, tiny_blocks: None) -> None:
    factory, make = MODELS[name]
    torch.manual_seed(1)
    plain, inputs = factory().eval(), make()
    nb.pack(plain.state_dict(), tmp_path / "w.safetensors")
    example = (inputs[0],) if isinstance(inputs[0], torch.Tensor) else inputs[0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            wanted = [call(plain, item) for item in inputs]
            check(factory, tmp_path / "w.safetensors", None if name == "data-dependent" else example, inputs, wanted)
    finally:
        torch.set_num_threads(before)


def check(factory: Any, path: Path, example: Any, inputs: list[Any], wanted: list[Any]) -> dict[str, Any]:
    with pytest.raises(BudgetError) as refused:
        nb.stream(factory, path, budget=1, example=example)
    for batch in (2, 5):
        model = nb.stream(factory, path, budget=refused.value.minimum, example=example).eval()
        with nb.session(model) as session:
            call(model, inputs[0])  # the trace, where there is none
            try:
                session.map([], batch)
            except BudgetError as error:
                session.budget = error.minimum
            got = within(60, lambda s=session, b=batch: mapped(s, inputs, b))
            assert [same(a, b) for a, b in zip(got, wanted, strict=True)] == [True] * len(wanted)
            stats = session.stats()
            assert session.plan.streamed
            assert stats["map_inputs"] > 0, stats["map_alone_reason"]
            assert stats["map_inputs"] + stats["map_alone"] == len(inputs)
            assert same(call(model, inputs[0]), wanted[0])
    return stats


def mapped(session: Any, inputs: Any, batch: int | None, **options: Any) -> list[Any]:
    with torch.inference_mode():
        return list(session.map(inputs, batch, **options))


KINDS = {
    "llama": ("LlamaForCausalLM", 0, 0),
    "t5": ("T5ForConditionalGeneration", 0, 0),
    "mixtral": ("MixtralForCausalLM", 0, 0),
    "albert": ("AlbertForMaskedLM", 0, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_have_the_bits_of_plain_passes(
    kind: str, tmp_path: Path, tiny_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from architecture_kit.build import build

    # Where experts are read on demand inputs go one by one; stacks in whole, as with verify=, go in lockstep.
    monkeypatch.setattr("narrowboat.stream.tiling.find_experts", lambda *given: None)
    class_name, profile, candidate = KINDS[kind]
    built = build(kind, {"class_name": class_name, "profile": profile, "candidate": candidate})
    inputs = []
    for shift in range(7):
        moved = {
            k: torch.roll(v, shift, -1) if isinstance(v, torch.Tensor) and not v.is_floating_point() else v
            for k, v in built.inputs.items()
        }
        inputs.append(moved)
    nb.pack(built.model.state_dict(), tmp_path / "w.safetensors")
    with torch.inference_mode():
        wanted = [built.model(**item) for item in inputs]
        check(built.factory, tmp_path / "w.safetensors", built.inputs, inputs, wanted)


# -- what a sweep saves -------------------------------------------------------------------------------------------


@pytest.fixture
def many(deep: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two dozen inputs, and plain PyTorch's answers."""
    torch.manual_seed(2)
    inputs = [torch.randn(2, 256) for _ in range(24)]
    with torch.inference_mode():
        return inputs, [deep.plain(x) for x in inputs]


def equal(got: list[Any], wanted: list[torch.Tensor]) -> bool:
    return len(got) == len(wanted) and all(map(torch.equal, got, wanted))


def test_a_group_reads_what_one_pass_reads(deep: Any, many: Any) -> None:
    inputs, wanted = many
    session = nb.session(deep.stream(budget=deep.minimum + MIB // 4))
    assert equal(mapped(session, inputs[:16], 1), wanted[:16])
    alone = session.stats()["bytes_read"]
    assert equal(mapped(session, inputs, 8), wanted)
    stats = session.stats()
    weights = session.plan.weight_bytes
    assert stats["map_sweeps"] >= 2
    # Reading runs ahead into the next sweep, so a sweep's share may be a block more or less.
    assert all(nbytes <= weights + weights // 4 for nbytes in stats["map_bytes_read"])
    per_input = sum(stats["map_bytes_read"]) / stats["map_inputs"]
    assert per_input <= min(alone[1:]) / 6


def test_when_everything_is_resident_inputs_are_passes_of_their_own(deep: Any, many: Any) -> None:
    session = nb.session(deep.stream(budget=64 * MIB))
    assert equal(mapped(session, many[0], 8), many[1])
    stats = session.stats()
    assert (stats["map_inputs"], stats["map_alone"], stats["passes"]) == (0, 24, 24)


def test_left_to_itself_it_finds_a_group(deep: Any, many: Any) -> None:
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    assert equal(mapped(session, many[0], None), many[1])
    stats = session.stats()
    assert stats["passes"] >= 2  # they measure
    assert stats["map_group"] >= 1
    assert stats["map_inputs"] + stats["map_alone"] == 24


def test_afterwards_the_plan_is_that_of_single_passes(deep: Any, many: Any) -> None:
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    outputs = session.map(many[0], 8)
    with torch.inference_mode():
        for _ in range(4):
            next(outputs)
        assert dict(session.plan.fixed_parts)["in flight"] > 0
        assert session.plan.budget == session.budget
        outputs.close()
    assert "in flight" not in dict(session.plan.fixed_parts)
    assert map_threads() == []
    assert deep.right(session.prepared.module)


def test_a_group_that_the_budget_cannot_hold_is_refused_with_the_smallest_that_can(deep: Any) -> None:
    with pytest.raises(BudgetError, match="cannot hold 64 inputs at once: they can only go one by one"):
        nb.session(deep.stream()).map([deep.x], 64)
    session = nb.session(deep.stream(budget=deep.minimum + MIB // 8))
    with pytest.raises(BudgetError, match="cannot hold 64 inputs at once: batch=") as refused:
        session.map([deep.x], 64)
    assert refused.value.minimum > session.budget
    best = int(str(refused.value).split("batch=")[1].split()[0])
    assert 1 < best < 64
    session.map([deep.x], best)
    with pytest.raises(BudgetError):
        session.map([deep.x], best + 1)


# -- order, laziness, arguments -----------------------------------------------------------------------------------


def test_both_ends_are_lazy(deep: Any) -> None:
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    pulled = itertools.count()
    last = [0]

    def endless() -> Iterator[torch.Tensor]:
        for last[0] in pulled:
            yield torch.full((1, 256), float(last[0] % 7))

    with torch.inference_mode():
        outputs = session.map(endless(), 4)
        assert next(pulled) == 0  # nothing is asked for until something is
        for i, output in zip(range(1, 30), outputs, strict=False):
            assert torch.equal(output, deep.plain(torch.full((1, 256), float(i % 7))))
            assert last[0] <= i + 4
        outputs.close()


def test_positional_keyword_and_single_arguments(deep: Any) -> None:
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    got = mapped(session, [deep.x, (deep.x,), {"x": deep.x}] * 3, 3)
    assert equal(got, [deep.want] * 9)


@pytest.mark.parametrize("inputs", [3, torch.zeros(2, 256), {"x": 1}, None], ids=repr)
def test_what_is_no_iterable_of_arguments_is_refused(deep: Any, inputs: Any) -> None:
    with pytest.raises(UsageError, match="iterable"):
        nb.session(deep.stream()).map(inputs)


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 65}, {"batch": True}, {"batch": 2.0}, {"errors": "no"}])
def test_arguments_that_cannot_be_used_are_refused_at_once(deep: Any, options: Any) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        nb.session(deep.stream()).map([], **options)


def test_no_inputs_give_no_outputs(deep: Any) -> None:
    assert mapped(nb.session(deep.stream()), [], None) == []


def test_a_bar_counts_the_outputs(deep: Any, many: Any, capfd: pytest.CaptureFixture[str]) -> None:
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    assert equal(mapped(session, many[0], 4, progress=True), many[1])
    assert equal(mapped(session, iter(many[0]), 4, progress=True), many[1])
    assert capfd.readouterr().out == ""


def test_the_callers_modes_are_the_passes_modes(deep: Any) -> None:
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    seen: set[Any] = set()
    model = session.prepared.module
    model.before[4] = lambda: seen.add(
        (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
    )
    with torch.no_grad():
        assert equal(list(session.map([deep.x] * 8, 4)), [deep.want] * 8)
        assert seen == {(False, False, False)}
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            want = deep.plain(deep.x)
            got = list(session.map([deep.x] * 8, 4))
    assert seen == {(False, False, True)}
    assert equal(got, [want] * 8)
    assert session.stats()["map_inputs"] >= 8


def test_modes_that_no_thread_can_be_given_make_inputs_go_one_by_one(deep: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    with FlopCounterMode(display=False) as counted:
        assert equal(mapped(session, [deep.x] * 8, 4), [deep.want] * 8)
    assert counted.get_total_flops() == 8 * 2 * 2 * (10 * 256 * 256 + 256 * 10)
    assert session.stats()["map_alone"] == 8


def test_gradients_are_refused_as_by_a_call(deep: Any) -> None:
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    with pytest.raises(GradientError):
        next(session.map([deep.x] * 8, 4))
    assert deep.right(session.prepared.module)


# -- models that keep things on themselves ------------------------------------------------------------------------


class Keeping(nn.Module):
    """``way`` says what it does to itself while it runs; its answer depends on it."""

    way = ""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(6)])
        self.register_buffer("notes", torch.zeros(64), persistent=False)
        self.seen: list[torch.Tensor] = []
        self.last: Any = None
        self.table: Any = None
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "attribute":
            self.last = x
        elif self.way == "passing attribute":
            self.__dict__["passing"] = x
        elif self.way == "list":
            self.seen.append(x)
        elif self.way == "buffer":
            with torch.inference_mode(False):
                self.notes.copy_(x[0].clone())
        elif self.way == "late":
            self.calls += 1
            if self.calls > 5:
                self.last = x
        elif self.way == "lazy" and self.table is None:
            self.table = torch.ones(64)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if self.way == "attribute" or (self.way == "late" and self.last is not None):
            x = x + self.last
        elif self.way == "passing attribute":
            x = x + self.__dict__.pop("passing")
        elif self.way == "list":
            x = x + self.seen.pop()
        elif self.way == "buffer":
            x = x + self.notes
        elif self.way == "random":
            x = x + torch.rand(64)
        elif self.way == "lazy":
            x = x + self.table
        return x


WAYS = ["", "attribute", "passing attribute", "list", "buffer", "random", "lazy"]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_keeps_something_on_itself_is_run_one_by_one(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_blocks: None
) -> None:
    monkeypatch.setattr(Keeping, "way", way)
    torch.manual_seed(3)
    plain = Keeping().eval()
    inputs = [torch.randn(1, 64) for _ in range(12)]
    nb.pack(plain.state_dict(), tmp_path / "w.safetensors")
    with torch.no_grad():
        torch.manual_seed(4)
        wanted = [plain(x) for x in inputs]
        with pytest.raises(BudgetError) as refused:
            nb.stream(Keeping, tmp_path / "w.safetensors", budget=1, example=(inputs[0],))
        budget = refused.value.minimum + 32 * 1024
        model = nb.stream(Keeping, tmp_path / "w.safetensors", budget=budget, example=(inputs[0],)).eval()
        with nb.session(model) as session:
            torch.manual_seed(4)
            assert equal(list(session.map(inputs, 4)), wanted)
            stats = session.stats()
    assert bool(stats["map_alone_reason"]) == (way not in ("", "lazy"))
    assert (stats["map_inputs"] > 0) == (way in ("", "lazy"))


def test_what_a_model_begins_to_keep_later_is_undone_and_run_again(deep: Any, many: Any) -> None:
    inputs, wanted = many
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    calls = itertools.count()
    model.marks = []

    def begin() -> None:
        if next(calls) == 9:
            model.marks.append(1)

    model.before[3] = begin
    assert equal(mapped(session, inputs, 4), wanted)
    assert session.stats()["map_alone_reason"]
    assert model.marks in ([], [1])
    assert session.stats()["map_inputs"] + session.stats()["map_alone"] == 24


def test_random_numbers_drawn_late_are_drawn_as_if_one_by_one(deep: Any, many: Any) -> None:
    model = deep.stream(budget=deep.minimum + MIB)
    calls = itertools.count()
    drawn: list[float] = []

    def draw() -> None:
        if next(calls) >= 6:
            drawn.append(float(torch.rand(())))

    model.before[3] = draw
    torch.manual_seed(5)
    assert equal(mapped(nb.session(model), many[0], 4), many[1])
    torch.manual_seed(5)
    expected = [float(torch.rand(())) for _ in range(len(many[0]))]
    # What the sweep had drawn is put back: the passes that follow begin with the same numbers.
    assert any(drawn[-n:] == expected[:n] for n in range(10, len(drawn) + 1))


# -- errors -------------------------------------------------------------------------------------------------------


def with_bad(inputs: list[torch.Tensor], *bad: int) -> list[torch.Tensor]:
    return [torch.randn(2, 99) if i in bad else x for i, x in enumerate(inputs)]


def test_a_failing_input_is_named_after_the_others_of_its_group(deep: Any, many: Any) -> None:
    inputs, wanted = many
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    assert equal(mapped(session, inputs[:3], 4), wanted[:3])
    got: list[torch.Tensor] = []
    with pytest.raises(MapError, match="input 5 failed") as raised, torch.inference_mode():
        got.extend(session.map(with_bad(inputs, 5, 6), 4))
    assert equal(got, [*wanted[:5], wanted[7]])
    assert (raised.value.index, raised.value.indices) == (5, (5, 6))
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert equal(mapped(session, inputs, 4), wanted)


def test_errors_can_be_returned_in_their_places(deep: Any, many: Any) -> None:
    inputs, wanted = many
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    got = mapped(session, [*with_bad(inputs, 0, 7, 8, 9, 10), "text"], 4, errors="return")
    assert [i for i, output in enumerate(got) if isinstance(output, MapError)] == [0, 7, 8, 9, 10, 24]
    assert all(got[i].index == i and got[i].__cause__ is not None for i in (0, 7, 8, 9, 10, 24))
    assert all(torch.equal(got[i], wanted[i]) for i in range(24) if i not in (0, 7, 8, 9, 10))


@pytest.mark.parametrize("at", [0, 5, 9])
def test_a_failure_anywhere_in_the_network_loses_nobody_else(deep: Any, many: Any, at: int) -> None:
    inputs, wanted = many
    model = deep.stream(budget=deep.minimum + MIB // 2)
    session = nb.session(model)
    assert equal(mapped(session, inputs[:5], 4), wanted[:5])
    calls = itertools.count()

    def fail() -> None:
        if next(calls) % 3 == 1:
            raise ValueError("no")

    model.before[at] = fail
    got = mapped(session, inputs, 6, errors="return")
    model.before.clear()
    assert sum(isinstance(output, MapError) for output in got) == 8
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True) if not isinstance(a, MapError))
    assert deep.right(model)


def test_inputs_that_break_off_deliver_what_came_before(deep: Any, many: Any) -> None:
    inputs, wanted = many

    def source() -> Iterator[torch.Tensor]:
        yield from inputs[:10]
        raise OSError("the camera is gone")

    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    got: list[torch.Tensor] = []
    with pytest.raises(OSError, match="camera"), torch.inference_mode():
        got.extend(session.map(source(), 4))
    assert equal(got, wanted[:10])


def test_a_model_that_leaves_the_program_does(deep: Any, many: Any) -> None:
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    assert equal(mapped(session, many[0][:4], 4), many[1][:4])
    model.before[5] = sys.exit
    with pytest.raises(SystemExit):
        mapped(session, many[0], 4)
    model.before.clear()
    assert deep.right(model)


def test_storage_trouble_in_the_middle_of_a_sweep(deep: Any, many: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from narrowboat.errors import StorageError

    model = deep.stream(budget=deep.minimum + MIB // 2)
    session = nb.session(model)
    assert equal(mapped(session, many[0][:4], 4), many[1][:4])
    real, failing = session.reader._read_into, [6]

    def read(*args: Any) -> None:
        if failing[0]:
            failing[0] -= 1
            raise StorageError("a loose cable")
        real(*args)

    monkeypatch.setattr(session.reader, "_read_into", read)
    got = within(60, lambda: mapped(session, many[0], 8, errors="return"))
    assert failing == [0]
    assert all(torch.equal(a, b) for a, b in zip(got, many[1], strict=True) if not isinstance(a, MapError))
    assert sum(isinstance(a, MapError) for a in got) <= 3
    assert deep.right(model)


# -- ends in the middle -------------------------------------------------------------------------------------------


def test_an_iterator_closed_or_dropped_early_leaves_no_thread(deep: Any, many: Any) -> None:
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    with torch.inference_mode():
        for taken in (1, 2, 3, 5, 8):
            outputs = session.map(itertools.cycle(many[0]), 4)
            assert equal(list(itertools.islice(outputs, taken)), many[1][:taken])
            del outputs
            assert map_threads() == []
    assert deep.right(model)


def test_an_exception_in_the_consumer_ends_the_map(deep: Any, many: Any) -> None:
    model = deep.stream(budget=deep.minimum + MIB)
    with pytest.raises(ZeroDivisionError), torch.inference_mode():
        for i, _ in enumerate(nb.session(model).map(many[0], 4)):
            1 / (5 - i)
    gc.collect()
    assert map_threads() == []
    assert deep.right(model)


@pytest.mark.parametrize("moment", range(12))
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_during_a_sweep_leaves_it_right(deep: Any, many: Any, moment: int) -> None:
    """Ctrl-C reaches the thread that waits for the crew, while some pass is at some layer."""
    import _thread

    model = deep.stream(budget=deep.minimum + MIB // 2)
    session = nb.session(model)
    assert equal(mapped(session, many[0][:4], 4), many[1][:4])
    calls = itertools.count()

    def strike() -> None:
        if next(calls) == 3 + moment * 3:
            _thread.interrupt_main()

    for layer in range(10):
        model.before[layer] = strike
    with pytest.raises(KeyboardInterrupt):
        mapped(session, itertools.islice(itertools.cycle(many[0]), 400), 4)
    model.before.clear()
    gc.collect()
    assert map_threads() == []
    assert within(30, lambda: deep.right(model, 3))
    assert equal(mapped(session, many[0], 4), many[1])


def test_an_interrupt_at_any_moment_of_the_callers_side_leaves_it_right_or_closed(deep: Any, many: Any) -> None:
    def sweep(session: Any) -> None:
        with torch.inference_mode():
            list(session.map(many[0][:9], 4))

    def fresh() -> Any:
        session = nb.session(deep.stream(budget=deep.minimum + MIB // 2))
        mapped(session, many[0], 4)
        return session

    session = fresh()
    counter = Interrupter(-1)
    counter.run(lambda: sweep(session))
    broken = []
    for at in range(1, counter.moments, max(counter.moments // 15, 1)):
        interrupter = Interrupter(at)
        if interrupter.run(lambda s=session: sweep(s)) == "done":
            continue
        gc.collect()
        model = session.prepared.module
        try:
            right = within(20, lambda m=model: deep.right(m, 2)) and equal(mapped(session, many[0], 4), many[1])
        except SessionClosedError:
            right, session = True, fresh()
        except BaseException as error:
            right = False
            interrupter.where += f": {type(error).__name__}: {error}"
        if not right or map_threads():
            broken.append(f"{interrupter.where} {map_threads()}")
            session = fresh()
    assert broken == []


def test_closing_the_session_between_outputs_says_so(deep: Any, many: Any) -> None:
    session = nb.session(deep.stream(budget=deep.minimum + MIB))
    with torch.inference_mode():
        outputs = session.map(many[0], 4)
        assert equal([next(outputs) for _ in range(3)], many[1][:3])
        session.close()
        assert map_threads() == []
        with pytest.raises(SessionClosedError):
            list(outputs)
    with pytest.raises(SessionClosedError):
        session.map(many[0])


def test_closing_the_session_during_a_sweep_waits_for_it(deep: Any, many: Any) -> None:
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    assert equal(mapped(session, many[0][:4], 4), many[1][:4])
    closer = threading.Thread(target=session.close)
    model.before[4] = lambda: None if closer.ident else closer.start()
    got: list[torch.Tensor] = []

    def consume() -> str:
        with torch.inference_mode():
            try:
                got.extend(session.map(itertools.cycle(many[0]), 4))
            except SessionClosedError:
                return "closed"
        return "ended"

    assert within(30, consume) == "closed"
    closer.join(10)
    assert got and all(torch.equal(a, b) for a, b in zip(got, many[1], strict=False))


def test_a_mapped_pass_cannot_close_its_session(deep: Any, many: Any) -> None:
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    assert equal(mapped(session, many[0][:4], 4), many[1][:4])
    model.before[4] = session.close
    got = within(30, lambda: mapped(session, many[0][:8], 4, errors="return"))
    assert all(isinstance(error.__cause__, UsageError) for error in got)
    model.before.clear()
    assert deep.right(model)


@pytest.mark.parametrize("where", ["between", "within", "another thread"])
def test_budget_changes_during_a_map_change_no_answer(deep: Any, many: Any, where: str) -> None:
    inputs, wanted = many
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    budgets = itertools.cycle(
        [deep.minimum, deep.minimum + MIB, 8 * MIB, deep.minimum + MIB // 2, deep.minimum + 8192]
    )
    stop = threading.Event()

    def change() -> None:
        session.budget = next(budgets)

    def keep_changing() -> None:
        while not stop.wait(0.003):
            change()

    changer = threading.Thread(target=keep_changing)
    if where == "within":
        count = itertools.count()
        model.before[5] = lambda: change() if next(count) % 3 == 0 else None
    if where == "another thread":
        changer.start()
    got = []
    try:
        with torch.inference_mode():
            for output in session.map(inputs * 4, 5):
                got.append(output)
                if where == "between":
                    change()
    finally:
        stop.set()
        if where == "another thread":
            changer.join()
    model.before.clear()
    assert equal(got, wanted * 4)
    assert "in flight" not in dict(session.plan.fixed_parts)
    session.budget = deep.minimum
    assert session.plan.budget == deep.minimum
    assert deep.right(model)


def test_a_cut_within_a_sweep_leaves_room_for_all_that_are_on_their_way(deep: Any, many: Any) -> None:
    model = deep.stream(budget=deep.minimum + 2 * MIB)
    session = nb.session(model)
    assert equal(mapped(session, many[0][:4], 4), many[1][:4])
    seen: list[tuple[int, bool]] = []
    wanted = deep.minimum + MIB

    calls = itertools.count()

    def cut() -> None:
        if next(calls) == 0:
            session.budget = wanted

    model.before[3] = cut
    model.before[9] = lambda: seen.append((session.budget, "in flight" in dict(session.plan.fixed_parts)))
    assert equal(mapped(session, many[0][:4], 4), many[1][:4])
    assert seen[-1] == (wanted, True)


def test_calls_and_maps_between_outputs(deep: Any, many: Any) -> None:
    inputs, wanted = many
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    with torch.inference_mode():
        one, other = session.map(inputs, 4), session.map(inputs, 3)
        for a, b, want in zip(one, other, wanted, strict=True):
            assert torch.equal(a, want) and torch.equal(b, want)
            assert torch.equal(model(deep.x), deep.want)
        one.close()
        other.close()
    assert "in flight" not in dict(session.plan.fixed_parts)


def test_maps_and_calls_in_several_threads(deep: Any, many: Any) -> None:
    inputs, wanted = many
    model = deep.stream(budget=deep.minimum + MIB)
    session = nb.session(model)
    results: list[bool] = []

    def use(batch: int) -> None:
        results.append(equal(mapped(session, inputs, batch), wanted) if batch else deep.right(model, 20))

    threads = [threading.Thread(target=use, args=(batch,), daemon=True) for batch in (4, 0, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 3


# -- the budget ---------------------------------------------------------------------------------------------------

CHILD = """
import hashlib, json, sys, torch
from torch import nn
import narrowboat as nb
from narrowboat.machine.memory import process_memory, reset_peak
path, threads, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
def factory():
    return nn.Sequential(*[nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(24)])
def digest(outputs):
    return [hashlib.sha256(y.numpy().tobytes()).hexdigest() for y in outputs]
generator = torch.Generator().manual_seed(1)
inputs = [torch.randn(48, 1024, generator=generator) for _ in range(20)]
with torch.inference_mode():
    budget = 56 << 20
    session = nb.session(nb.stream(factory, path, budget=budget, example=(inputs[0],)))
    reset_peak()  # of importing the tracer
    rounds = [digest(session.map(inputs, batch or None)) for _ in range(3)]
    told = {k: v for k, v in session.stats().items() if k.startswith("map") or k == "weight_bytes"}
    over = process_memory().hwm - session.baseline - budget
    session.close()
    torch.manual_seed(0)
    plain = factory()
    wanted = digest(plain(x) for x in inputs)
print(json.dumps({"rounds": rounds, "wanted": wanted, "over": over, **told}))
"""


def child(*arguments: object) -> Any:
    environment = {**os.environ, "GOMP_SPINCOUNT": "1000"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("threads", "batch"), [(1, 6), (2, 0)])
def test_a_map_stays_within_the_budget(tmp_path: Path, threads: int, batch: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(24)]
    nb.pack(nn.Sequential(*layers).state_dict(), tmp_path / "w.safetensors")
    told = child(tmp_path / "w.safetensors", threads, batch)
    assert told["rounds"] == [told["wanted"]] * 3
    assert told["weight_bytes"] > 96 * MIB
    assert not batch or told["map_inputs"] >= 50
    assert told["over"] <= 0


def test_the_benchmark_can_be_imported() -> None:
    import importlib.util

    path = Path(__file__).resolve().parents[2] / "benchmarks" / "map.py"
    spec = importlib.util.spec_from_file_location("map_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(list(module.varied((torch.ones(1, 3), torch.tensor([[1, 5, 2]])), 4, tokens=1))) == 4
