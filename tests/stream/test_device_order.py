"""No interleaving of reads, copies and kernels lets a block be read before it is ready, or overwritten in use.

The emulated device proves order by what has been waited for, not by what happened to run first
(``arena.device.order``), so one run of a sequence of calls speaks for all its interleavings. Its threads are jittered
besides, and the bytes of a copy's target are spoiled when it begins. That the proof can fail is shown by taking out
each wait there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import narrowboat as nb
from device_kit import DeviceKit, watched
from narrowboat.arena.device.lanes import ComputeLane, CopyLane, LaneEvent
from narrowboat.errors import BudgetError, DeviceOrderError
from narrowboat.stream import device_channel
from narrowboat.stream.staging import staging_bytes

ACTIONS = ["call", "call", "call", "budget", "layer", "state", "weight", "other stream", "keep"]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_sequence_of_uses_breaks_the_order(tmp_path_factory: Any, tiny_blocks: None, data: st.DataObject) -> None:
    widths = tuple(data.draw(st.lists(st.sampled_from([32, 64, 96, 160, 224]), min_size=3, max_size=9)))
    kit = DeviceKit(tmp_path_factory.mktemp("order"), packed=data.draw(st.booleans()), widths=widths)
    unified = data.draw(st.booleans())
    device = kit.device(unified=unified, jitter=data.draw(st.integers(0, 99)))
    least = kit.least(device)
    host = None if unified else data.draw(st.sampled_from([350_000, 400_000, 64 << 20]))
    model = kit.stream(device, budget=least + data.draw(st.integers(0, 300_000)), host=host)
    session = nb.session(model)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with watched(device), torch.inference_mode():
        assert torch.equal(model(kit.x), kit.want)
        for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=8)):
            layer = data.draw(st.integers(0, len(widths) - 2))
            mine, plain = model.layers[layer], kit.plain.layers[layer]
            if action in ("state", "weight", "keep"):
                device.synchronize()  # beside a pass, another stream's weights are its user's to put in order
            try:
                if action == "call":
                    assert torch.equal(model(kit.x), kit.want)
                elif action == "budget":
                    session.budget = least + data.draw(st.integers(0, 300_000))
                elif action == "layer":
                    x = torch.randn(2, plain.in_features)
                    assert torch.equal(mine(x), plain(x))
                elif action == "state":
                    assert all(torch.equal(v, kit.plain.state_dict()[k]) for k, v in model.state_dict().items())
                elif action == "weight":
                    assert torch.equal(mine.weight + 1, plain.weight + 1)
                elif action == "keep":
                    kept.append((mine.weight.detach()[1:], plain.weight[1:]))
                else:
                    device._compute.__dict__.pop("lane", None)  # the calling thread goes on on another stream
            except BudgetError:
                pass  # no room beside the plan for what is used off it
        device.synchronize()  # what is used on another stream than it was made on is its user's to put in order
        assert all(torch.equal(a, b) for a, b in kept)
    session.close()


def without(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Take one of the waits out."""
    if what == "copies wait for kernels":
        monkeypatch.setattr(CopyLane, "wait", lambda self, event: None)
    elif what == "kernels wait for copies":
        monkeypatch.setattr(device_channel.DeviceChannel, "make_ready", lambda self, block: None)
    elif what == "readers wait for copies from their buffers":
        monkeypatch.setattr(LaneEvent, "wait", lambda self: self.hold())
    elif what == "a pass follows the one on another stream":
        monkeypatch.setattr(device_channel._Ordered, "_follow", lambda self: self._device.compute())
    elif what == "the mark is made after the last use":
        earlier: dict[int, LaneEvent] = {}
        record = ComputeLane.record

        def stale(self: ComputeLane, *, timed: bool = False) -> LaneEvent:
            event = record(self, timed=timed)
            return event if timed else earlier.setdefault(id(self), event)

        monkeypatch.setattr(ComputeLane, "record", stale)


@pytest.mark.parametrize(
    "what",
    [
        "copies wait for kernels",
        "kernels wait for copies",
        "readers wait for copies from their buffers",
        "a pass follows the one on another stream",
        "the mark is made after the last use",
    ],
)
def test_every_wait_is_needed_and_missed(
    tmp_path: Path, tiny_blocks: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    kit = DeviceKit(tmp_path)
    device = kit.device()
    probe = kit.stream(device, host="64MiB")
    workers = nb.session(probe).prepared.storage.depth
    nb.session(probe).close()
    uncached = what == "readers wait for copies from their buffers"
    model = kit.stream(device, host=staging_bytes(64 << 10, workers) if uncached else "64MiB")
    with watched(device), torch.inference_mode():
        for _ in range(4):  # while passes are measured, the host waits for the end of each
            model(kit.x)
        without(monkeypatch, what)
        with pytest.raises(DeviceOrderError, match=r"used before ready|overwritten while in use"):
            for _ in range(4):
                model(kit.x)
                for layer in model.layers:
                    device._compute.__dict__.pop("lane", None)
                    assert (layer.weight + 1).any()  # outside a pass nothing is brought ahead of its use
    monkeypatch.undo()
    nb.session(model).engine._reader.drain()


def test_reading_into_the_arena_in_place_waits_for_kernels(
    tmp_path: Path, tiny_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = DeviceKit(tmp_path)
    device = kit.device(unified=True)
    model = kit.stream(device)
    with watched(device), torch.inference_mode():
        model(kit.x)
        monkeypatch.setattr(LaneEvent, "wait", lambda self: self.hold())
        with pytest.raises(nb.errors.NarrowboatError, match="overwritten while in use"):
            for _ in range(3):
                model(kit.x)
    monkeypatch.undo()
