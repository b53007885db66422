"""A task's network on a device: every unit has addresses of its own, for good; blocks and pins say what is in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from narrowboat.stream.blocks import BlockState, State
from narrowboat.tasks.execute.device_load import Passage
from narrowboat.tasks.execute.device_place import DevicePlace, Span, Window
from narrowboat.tasks.execute.mirrors import Mirror
from narrowboat.tasks.execute.model import Placement, TaskModel, Unit, Way, hide

if TYPE_CHECKING:
    from narrowboat.tasks.execute.device_ground import DeviceGround

_CHUNKS = 4  # of the smallest unit: less is lost to its last one, and a boundary costs more on a device


def in_chunks(units: Sequence[Unit], chunk: int) -> list[Unit]:
    """Neighbours together until each has some chunks; each in whole chunks, so that every one can go by itself."""
    joined: list[Unit] = []
    for unit in units:
        last = joined[-1] if joined else None
        if last is not None and min(last.nbytes, unit.nbytes) < _CHUNKS * chunk:
            groups = tuple(sorted((*last.groups, *unit.groups)))
            joined[-1] = Unit(groups, last.first_step, last.nbytes + unit.nbytes)
        else:
            joined.append(unit)
    return [Unit(unit.groups, unit.first_step, -(-unit.nbytes // chunk) * chunk) for unit in joined]


class DeviceTaskModel(TaskModel):
    """See ``TaskModel``. Swapping in is mapping and copying, swapping out is unmapping.

    Args:
        spec: MODEL as on the command line.
        weights: their file; None for the factory's own.
        source: an input file; None for the example's inputs.
        ground: the device.

    Attributes:
        window: its addresses.
        homes: of every unit, the first byte in the window; then of what always stays.
        used: bytes of every unit that hold weights.
        parts: what every unit shows, and where that lies at rest.
        mirrored: units that are to be in host memory; None while that is not decided.
        mirror: its units in host memory.
        known: what the thread that brought pinned units in knew then.
    """

    def __init__(self, spec: str, weights: Path | None, source: Path | None, ground: DeviceGround) -> None:
        super().__init__(spec, weights, source, device=ground.device, chunk=ground.read_chunk)
        self.ground = ground
        self.units = in_chunks(self.units, ground.chunk)
        stay = sum(self.groups[n].block.nbytes for n in self.staying)
        self._stay = -(-stay // ground.chunk) * ground.chunk
        self.homes = list(accumulate((unit.nbytes for unit in self.units), initial=0))
        self.window = Window(ground.device, self.homes[-1] + self._stay, ground.chunk, ground.tally)
        self.parts = [self._unit(k, home) for k, home in enumerate(self.homes)]
        self.used = [part.nbytes for part in self.parts]
        for part, home in zip(self.parts, self.homes, strict=True):
            part.bind(self.window, home)
        adopt_buffers(self.module, ground.torch_device)
        self.mirrored: list[int] | None = None
        self.mirror = Mirror(ground.device, self.used, ())
        self.known: object = None
        self.identity |= {"chunk": ground.chunk, "device": ground.identity}

    @property
    def resident_bytes(self) -> int:
        """Bytes of device memory that stay, as it is laid out now."""
        pins = self.placement.pins if self.placement is not None else ()
        return self._stay + sum(self.units[k].nbytes for k in pins)

    @property
    def staying_bytes(self) -> int:
        """See ``TaskModel``; whole chunks."""
        return self._stay

    @property
    def fixed_bytes(self) -> int:
        """See ``TaskModel``: on the device there are only buffers."""
        return self.prepared.fixed_parts.get("buffers", 0)

    # -- host memory -----------------------------------------------------------------------------------

    @property
    def reads(self) -> bool:
        """Whether some of it is read from storage each time."""
        return self.mirrored is not None and any(n and k not in self.mirrored for k, n in enumerate(self.used))

    def plan_mirror(self, units: Collection[int]) -> None:
        """Which units are to be in host memory; what loading costs depends on it."""
        self.mirrored = sorted(units)
        self.identity["mirrored"] = self.mirrored

    def fill_mirror(self) -> None:
        """Have those units in host memory, read from storage now; once.

        Raises:
            PinnedMemoryError: the system refuses to pin so much.
            StorageError: they cannot be read.
        """
        if self.mirror.offsets or not self.mirrored:
            return
        device = self.ground.device
        mirror = Mirror(device, self.used, self.mirrored)
        try:
            for unit, offset in mirror.offsets.items():
                assert mirror.slab is not None
                part = self._unit(unit, offset)
                self.reader.wait(self.reader.submit(part.name, mirror.slab, part.extents))
            if mirror.slab is not None:
                device.host_writes(mirror.slab.address, mirror.nbytes)
        except BaseException:
            self.reader.drain()
            mirror.close()
            raise
        mirror.known = device.hand_over()
        self.mirror = mirror

    def _unit(self, unit: int, base: int) -> BlockState:
        """A unit, or what always stays, at ``base``."""
        groups = self.units[unit].groups if unit < len(self.units) else self.staying
        return self._state(groups, base, f"unit {unit}", self.prepared.index.packed, self.prepared.weights)

    # -- where things lie ------------------------------------------------------------------------------

    def arrange(self, pool: Any, ends: Sequence[int], pins: Iterable[int]) -> None:
        """See ``TaskModel``."""
        pinned = set(pins)
        resident = [*sorted(pinned), len(self.units)]
        spans = [span for k in resident if (span := self._span(k)) is not None]
        self.known = Passage(self, spans).run()
        self._resident = self._together(resident, "resident")
        self._resident.state = State.IN
        self._resident.show()
        self.blocks, self.places = [], []
        self.placement = Placement(tuple(ends), frozenset(pinned))
        start = 0
        for number, end in enumerate(ends):
            members = [k for k in range(start, end) if k not in pinned]
            block = self._together(members, f"block {number}")
            spans = [span for k in members if (span := self._span(k)) is not None]
            nbytes = sum(high - low for _, low, high in spans)
            self.blocks.append(block)
            place = DevicePlace(block.name, self.window, spans[0][1], nbytes, spans=spans) if spans else None
            self.places.append(place)
            start = end
        self.gate.cut([self.units[start].first_step for start in [0, *ends[:-1]]])

    def _span(self, unit: int) -> Span | None:
        """Of a unit, or of what always stays."""
        low = self.homes[unit]
        high = low + (self.units[unit].nbytes if unit < len(self.units) else self._stay)
        return (unit, low, high) if high > low else None

    def _together(self, units: Sequence[int], name: str) -> BlockState:
        block = BlockState(0, name, 0, [], (), 0, [], False, bound=True)
        for k in units:
            block.weights += self.parts[k].weights
            block.places += tuple(self.homes[k] + place for place in self.parts[k].places)
            block.nbytes += self.parts[k].nbytes
        return block

    def dismantle(self) -> None:
        """See ``TaskModel``: nothing of it is in then; every address stays."""
        if self.placement is None:
            return
        for state in (self._resident, *self.blocks):
            hide(state, self.window)
        self.ground.device.synchronize()  # nothing is under way, but this thread does not know it yet
        self.window.unback(0, self.window.nbytes)
        self.blocks, self.places, self.placement = [], [], None

    def hide(self, block: int) -> None:
        """See ``TaskModel``."""
        hide(self.blocks[block], self.window)

    def way(self, block: int) -> Way:
        """See ``TaskModel``; of a block that was swapped out by volume, only what is out."""
        place = self.places[block]
        assert isinstance(place, DevicePlace)
        return Passage(self, place.part(0, place.out))

    # -- in the thread of a job ------------------------------------------------------------------------

    def take(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """See ``TaskModel``."""
        self.ground.device.take_over(self.known)
        moved: tuple[Any, ...] = self._to(inputs, self.ground.torch_device)
        return moved

    def ready(self, block: int) -> None:
        """See ``TaskModel``."""
        place = self.places[block]
        if place is not None:
            self.ground.device.take_over(place.known)

    def settle(self) -> None:
        """See ``TaskModel``: the mark is the block's boundary, and its time is the device's."""
        self.ground.device.compute().record().wait()

    def give(self, output: Any) -> Any:
        """See ``TaskModel``."""
        return self._to(output, torch.device("cpu"))

    def _to(self, value: Any, device: torch.device) -> Any:
        if self.ground.torch_device.type == "cpu":
            return value
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)

    def close(self) -> None:
        """See ``TaskModel``; device and host memory are given back."""
        super().close()
        self.ground.device.synchronize()
        for part in self.parts:
            for weight in part.weights:
                for slot in weight.slots:
                    if not slot.inside:
                        slot.unbind()
        self.window.close()
        self.mirror.close()
        self.ground.closed(self)


def adopt_buffers(module: nn.Module, device: torch.device) -> None:
    """Have the buffers that are no weights where the weights will be."""
    if device.type == "cpu":
        return
    moved: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name in child._non_persistent_buffers_set and buffer.device.type != "meta":
                child._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))
