"""A task's network in the executor: a skeleton, its weights at fixed addresses, cut into blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from narrowboat.arena.device.interface import Device
from narrowboat.arena.pool import PooledSlab
from narrowboat.arena.slab import PAGE, Slab
from narrowboat.errors import ModelError
from narrowboat.profile.order import split_example
from narrowboat.profile.skeleton import attach_slots
from narrowboat.profile.tiles import install
from narrowboat.profile.use_trace import UseTrace
from narrowboat.profile.workload import Group, form_groups
from narrowboat.stream.blocks import BlockState, State, extents_of
from narrowboat.stream.prepare import prepare
from narrowboat.stream.reader import Job as ReadJob
from narrowboat.stream.reader import Reader, WeightsFile
from narrowboat.stream.rows import RowReader
from narrowboat.stream.tiling import tiled_above
from narrowboat.stream.wrap import wrap_modules
from narrowboat.tasks.execute.gate import Gate
from narrowboat.tasks.execute.space import Place
from narrowboat.tasks.execute.wire import spec_of, split
from narrowboat.tasks.tensors import TensorSpec
from narrowboat.trace import Trace
from narrowboat.zoo.request import Request, find_request

# Bytes of a weight from which on its layer is computed in tiles, so that no window has to hold more. Whatever the
# budget, so that what was measured stays true when it changes.
_TILE = 32 << 20


@dataclass(frozen=True)
class Unit:
    """The least that can be a block: weights whose uses overlap.

    Attributes:
        groups: their numbers.
        first_step: of the traced pass, at which it begins.
        nbytes: it takes in memory, whole pages.
    """

    groups: tuple[int, ...]
    first_step: int
    nbytes: int


class Way(Protocol):
    """A block on its way to its place."""

    def cancel(self) -> None:
        """From another thread: end soon."""

    def run(self) -> object:
        """Return when the bytes are there, with what the calling thread knows then (``Ground.hand_over``).

        Raises:
            NarrowboatError: they are not, because of an error or ``cancel``.
        """


class ReadIn:
    """A block that is read from storage straight to where it is used.

    Args:
        reader: reads.
        job: that is under way.
        files: that it reads from.
    """

    def __init__(self, reader: Reader, job: ReadJob, files: Sequence[WeightsFile]) -> None:
        self._reader, self._job, self._files = reader, job, files

    def cancel(self) -> None:
        """See ``Way``."""
        self._reader.cancel(self._job)

    def run(self) -> object:
        """See ``Way``."""
        self._reader.wait(self._job)
        for file in self._files:  # or a file that was written over would be half of the network
            file.check_open_file()
        return None


@dataclass(frozen=True)
class Placement:
    """How a network is laid out.

    Attributes:
        ends: of its blocks, as places one past their last unit.
        pins: units that stay in memory.
    """

    ends: tuple[int, ...]
    pins: frozenset[int]


def form_units(groups: Sequence[Group]) -> tuple[list[Unit], list[int]]:
    """Units in order of use, and the numbers of the groups that have to stay: used again after others were.

    The first unit begins with the pass, whatever its first weight.
    """
    single = sorted(
        (group.block.holds[0][0], group.block.holds[0][1], number)
        for number, group in enumerate(groups)
        if len(group.block.holds) == 1
    )
    staying = [number for number, group in enumerate(groups) if len(group.block.holds) > 1]
    spans: list[tuple[int, int, list[int]]] = []
    for first, last, number in single:
        if spans and first <= spans[-1][1]:
            begin, end, members = spans.pop()
            spans.append((begin, max(end, last), [*members, number]))
        else:
            spans.append((first, last, [number]))
    units = [
        Unit(tuple(sorted(members)), first if place else 0, sum(groups[n].block.nbytes for n in members))
        for place, (first, _, members) in enumerate(spans)
    ]
    return units or [Unit((), 0, 0)], staying


class TaskModel:
    """One network, which one or several tasks run.

    Args:
        spec: MODEL as on the command line.
        weights: their file; None for the factory's own.
        source: an input file; None for the example's inputs.
        device: where it runs; None for the processor.
        chunk: bytes of one read at most; None for what the storage is best at.

    Attributes:
        module: the skeleton.
        inputs: positional arguments of a pass.
        units: the finest blocks.
        placement: how it is laid out now; None if it is not.
        grown_bytes: by which the process grew as it was opened.
        staying_bytes: of weights that cannot be swapped by block.
        identity: of weights, inputs, torch and machine, and how layers are cut: what measurements depend on.

    Raises:
        NarrowboatError: model, weights or inputs cannot be used.
        ModelError: no traced order, which tasks need.
    """

    def __init__(
        self,
        spec: str,
        weights: Path | None,
        source: Path | None = None,
        *,
        device: Device | None = None,
        chunk: int | None = None,
    ) -> None:
        self.request: Request = find_request(spec, weights, source)
        self.inputs = self.request.need_inputs()
        example = split_example(self.inputs)
        self.prepared = prepare(self.request.factory, self.request.source, example, device=device)
        if self.prepared.trace is None:
            raise ModelError(f"{spec} cannot be a task: {self.prepared.why_untraced}")
        if self.prepared.trace.written:
            raise ModelError(f"{spec} cannot be a task: its passes write to its weights")
        measured = self.prepared.measured
        self.identity: dict[str, Any] = (
            dict(measured.identity) if measured is not None else {"weights": self.prepared.index.digest}
        )
        self.prepared = tiled_above(self.prepared, _TILE)
        if self.prepared.tiling is not None:
            self.identity["tiles"] = [[layer.name, len(layer.tiles)] for layer in self.prepared.tiling.layers]
        assert self.prepared.trace is not None
        self.trace: UseTrace = self.prepared.trace
        self.module = self.prepared.module
        index = self.prepared.index
        self.groups = form_groups(self.trace, self.prepared.weights, packed=index.packed)
        self.units, self.staying = form_units(self.groups)
        self.files = [WeightsFile(p, stamp, direct=True) for p, stamp in zip(index.files, index.stamps, strict=True)]
        self._numbers = {str(file.path): i for i, file in enumerate(self.files)}
        storage = self.prepared.storage
        self.reader = Reader(
            self.files, chunk=min(storage.chunk, chunk or storage.chunk), workers=storage.depth, trace=Trace(8)
        )
        self.placement: Placement | None = None
        self.grown_bytes = 0
        self.blocks: list[BlockState] = []
        self.places: list[Place | None] = []
        self.boundary: Callable[[int], None] = lambda block: None
        if self.prepared.tiling is not None:
            rows = RowReader(self.reader, self._numbers, [stamp.size for stamp in index.stamps])
            install(self.module, self.prepared.tiling, self.prepared.matched.numbers, rows)
        for weight in self.prepared.weights:
            weight.device = device.torch_device if device is not None else torch.device("cpu")
        attach_slots(self.module, self.prepared.matched)
        self.gate = Gate(self.trace.events, self.prepared.weights, lambda block: self.boundary(block))
        wrap_modules(self.module, self.gate)  # type: ignore[arg-type]

    @property
    def staying_bytes(self) -> int:
        """Of weights that are used again after others: they are resident in any case."""
        return sum(self.groups[number].block.nbytes for number in self.staying)

    @property
    def resident_bytes(self) -> int:
        """Of weights that stay, as it is laid out."""
        return 0 if self.placement is None else self._resident.nbytes

    @cached_property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Of the tensors of ``inputs``."""
        return tuple(spec_of("", tensor) for tensor in split(list(self.inputs))[1])

    def blocks_in(self) -> list[int]:
        """Numbers of the blocks whose weights are all in memory now."""
        return [number for number, place in enumerate(self.places) if place is None or place.valid]

    @property
    def fixed_bytes(self) -> int:
        """Beside weights and activations: buffers, bookkeeping, staging of unpacked files."""
        return sum(self.prepared.fixed_parts.values()) + self.reader.staging_bytes * (not self.prepared.index.packed)

    def block_bytes(self, placement: Placement) -> tuple[int, ...]:
        """Bytes of each block that come and go."""
        starts = (0, *placement.ends[:-1])
        return tuple(
            sum(self.units[unit].nbytes for unit in range(start, end) if unit not in placement.pins)
            for start, end in zip(starts, placement.ends, strict=True)
        )

    def arrange(self, pool: Any, ends: Sequence[int], pins: Iterable[int]) -> None:
        """Lay the network out: blocks of units, pinned ones and those that stay in memory of their own.

        Args:
            pool: backs the others while they are in.
            ends: of each block, as places one past its last unit.
            pins: units that stay.
        """
        packed, weights = self.prepared.index.packed, self.prepared.weights
        pinned = set(pins)
        streamed = [n for k, unit in enumerate(self.units) if k not in pinned for n in unit.groups]
        resident = sorted({*self.staying, *(n for k in pinned for n in self.units[k].groups)})
        self._home = Slab(max(sum(self.groups[n].block.nbytes for n in resident), PAGE), populate=bool(resident))
        self._window = PooledSlab(max(sum(self.groups[n].block.nbytes for n in streamed), PAGE), pool)
        self._resident = self._state(resident, 0, "resident", packed, weights)
        self._read(self._resident, self._home)
        self._resident.bind(self._home, 0)
        self._resident.show()
        self.blocks, self.places = [], []
        self.placement = Placement(tuple(ends), frozenset(pinned))
        base, start = 0, 0
        for number, end in enumerate(ends):
            members = [n for k in range(start, end) if k not in pinned for n in self.units[k].groups]
            block = self._state(members, base, f"block {number}", packed, weights)
            self.blocks.append(block)
            self.places.append(Place(block.name, self._window, base, block.nbytes) if block.nbytes else None)
            if block.nbytes:
                block.bind(self._window, base)
            base += block.nbytes
            start = end
        self.gate.cut([self.units[start].first_step for start in [0, *ends[:-1]]])

    def dismantle(self) -> None:
        """Stand-ins where the weights were, and their memory given back; the network can be laid out anew."""
        if self.placement is None:
            return
        for state in (self._resident, *self.blocks):
            for weight in state.weights:
                for slot in weight.slots:
                    if slot.take_out():
                        slot.rescue()
                    slot.unbind()
        self._home.close()
        self._window.close()
        del self._resident, self._home, self._window
        self.blocks, self.places, self.placement = [], [], None

    def _state(self, members: Sequence[int], base: int, name: str, packed: bool, weights: Any) -> BlockState:
        """Several groups as one block at ``base``."""
        state = BlockState(0, name, 0, [], (), base, [], False)
        at = 0
        for number in members:
            group = self.groups[number]
            state.weights += [weights[w] for w in group.weights]
            state.places += tuple(at + place for place in group.places)
            state.extents += extents_of(group, weights, self._numbers, base + at, packed=packed)
            at += group.block.nbytes
        state.nbytes = at
        return state

    def _read(self, block: BlockState, slab: Slab) -> None:
        if block.extents:
            self.reader.wait(self.reader.submit(block.name, slab, block.extents))
        block.state = State.IN

    def way(self, block: int) -> Way:
        """Start to bring a block whose place is backed."""
        job = self.reader.submit(self.blocks[block].name, self._window, self.blocks[block].extents)
        return ReadIn(self.reader, job, self.files)

    # -- in the thread of a job ------------------------------------------------------------------------

    def take(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A job begins: its inputs where the network is."""
        return inputs

    def ready(self, block: int) -> None:
        """A block that is in is about to be shown."""

    def settle(self) -> None:
        """Return when all that was given to be computed has been."""

    def give(self, output: Any) -> Any:
        """The output of a job, for whoever asked."""
        return output

    def show(self, block: int) -> None:
        """The model sees the block's weights."""
        self.blocks[block].show()

    def hide(self, block: int) -> None:
        """Stand-ins where the block's weights were; bytes that somebody kept are moved aside."""
        hide(self.blocks[block], self._window)

    def close(self) -> None:
        """Stop the reader and close the files."""
        self.reader.close()


def hide(state: BlockState, slab: Any) -> None:
    """Stand-ins where a block's weights were, whose places are in ``slab``; bytes that somebody kept move aside."""
    if not state.shown:
        return
    state.shown = False
    for weight, place in zip(state.weights, state.places, strict=True):
        for slot in weight.slots:
            if slot.take_out():
                slot.rescue()
                slot.bind(slab.tensor((state.offset or 0) + place, weight.entry.dtype, weight.entry.shape))
