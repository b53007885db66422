"""What a compiled plan holds at every moment of a step, operator by operator. Pure, no torch.

The planner's chain counts by units and rounds up. This counts each storage, as the run will: originals and replayed
copies, frames, compacted cells, the gradients and temporaries of the measured backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from narrowboat.train.tape.frames import Frame, StepPlan, Treatment
from narrowboat.train.tape.structure import Tape

_Copy = tuple[int, int]  # storage, and which copy: -1 the original, else the frame that replayed it


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a step will take.

    Attributes:
        peak: bytes at the worst moment, beyond weights, buffers, gradients of parameters and the batch.
        forward_peak, backward_peak: of the two passes.
        spilled: bytes that go to storage.
        replayed_seconds: time of the replays, by the measured times.
        where: the module at work at the worst moment.
        gradients: bytes of parameters' gradients that are there at the worst moment of the backward pass.
        anew: bytes of kernels that did not fit into the room that was given beside what is held: the system hands
            them out once more.
    """

    peak: int
    forward_peak: int
    backward_peak: int
    spilled: int
    replayed_seconds: float
    where: str
    gradients: int = 0
    anew: int = 0


def foresee(tape: Tape, plan: StepPlan, in_flight: int = 0, room: int | None = None) -> Foreseen:
    """Count a step.

    Args:
        tape: the pass, with its backward.
        plan: compiled for it.
        in_flight: bytes that the spill pool may hold at any moment.
        room: bytes that the allocator may keep; None for any number.
    """
    return _Count(tape, plan, in_flight, room).run()


class _Count:
    def __init__(self, tape: Tape, plan: StepPlan, in_flight: int, room: int | None) -> None:
        self._tape = tape
        self._plan = plan
        self._users: dict[_Copy, int] = {}
        self._held = 0
        self._extra = 0  # compacted cells
        self._frame_of_unit = list(plan.frame_of_unit)
        self._frames: dict[int, dict[int, _Copy]] = {}
        self._cells: dict[tuple[int, int], tuple[_Copy | None, int]] = {}
        self._savings: dict[tuple[int, int], int] = {}
        self._spilled = 0
        self._in_flight = in_flight
        self._peaks = [0, 0]
        self._where = ["", ""]
        self._live = 0
        self._gradients = self._gradients_then = 0
        self._room = room
        self._anew = 0

    def run(self) -> Foreseen:
        self._forward()
        self._backward()
        worst = 0 if self._peaks[0] >= self._peaks[1] else 1
        floor = self._in_flight if self._spilled else 0
        return Foreseen(
            peak=self._peaks[worst] + floor,
            forward_peak=self._peaks[0] + floor,
            backward_peak=self._peaks[1] + floor,
            spilled=self._spilled,
            replayed_seconds=self._plan.replayed_seconds,
            where=self._where[worst],
            gradients=self._gradients_then if worst else 0,
            anew=self._anew,
        )

    def _turnover(self, index: int) -> int:
        return self._plan.takes[index].turnover if index < len(self._plan.takes) else 0

    # -- holding -------------------------------------------------------------------------------------------------

    def _hold(self, copy: _Copy) -> None:
        users = self._users.get(copy, 0)
        if users == 0:
            self._held += self._tape.storages[copy[0]].nbytes
        self._users[copy] = users + 1

    def _release(self, copy: _Copy) -> None:
        self._users[copy] -= 1
        if self._users[copy] == 0:
            del self._users[copy]
            self._held -= self._tape.storages[copy[0]].nbytes

    def _load(self, taken: int) -> None:
        if self._room is not None and self._held + self._extra + self._live + taken > self._room:
            self._anew += taken

    def _note(self, phase: int, more: int, where: str) -> None:
        total = self._held + self._extra + self._live + more
        if total > self._peaks[phase]:
            self._peaks[phase], self._where[phase] = total, where
            self._gradients_then = self._gradients

    # -- forward -------------------------------------------------------------------------------------------------

    def _forward(self) -> None:
        dying: dict[int, list[int]] = {}
        saving: dict[int, list[int]] = {}
        for storage in self._tape.storages:
            dying.setdefault(max(storage.dies, storage.creator + 1), []).append(storage.number)
            for at in storage.saved_at:
                saving.setdefault(at, []).append(storage.number)
        spill_at: dict[int, list[int]] = {}
        for index in {frame for frame in self._plan.frame_of_unit if frame >= 0}:
            self._frames[index] = {}
            if self._plan.frames[index].spilled:
                spill_at.setdefault(self._plan.cuts[self._plan.frames[index].start], []).append(index)
        for op in self._tape.ops:
            self._save(op.index, saving)
            self._load(self._turnover(op.index))
            for number in op.created:
                self._hold((number, -1))
                for frame in self._plan.captures.get(number, ()):
                    self._hold((number, -1))
                    self._frames[frame][number] = (number, -1)
            self._note(0, op.scratch, op.module)
            for frame in spill_at.get(op.index + 1, ()):
                for copy in self._frames[frame].values():
                    self._release(copy)
                    self._spilled += self._tape.storages[copy[0]].nbytes
                self._frames[frame] = {number: (number, frame) for number in self._frames[frame]}
            self._save(op.index + 1, saving)
            for number in dying.get(op.index + 1, ()):
                self._release((number, -1))

    def _save(self, at: int, saving: dict[int, list[int]]) -> None:
        for number in saving.pop(at, ()):
            treatment, unit = self._plan.treatments[(number, at)]
            key = (number, unit)
            self._savings[key] = self._savings.get(key, 0) + 1
            if key in self._cells:
                continue
            storage = self._tape.storages[number]
            if treatment is Treatment.KEEP:
                self._hold((number, -1))
                self._cells[key] = ((number, -1), 0)
            elif treatment is Treatment.COMPACT and storage.shrinks:
                self._extra += storage.shrinks
                self._cells[key] = (None, storage.shrinks)
            elif treatment is Treatment.COMPACT:
                self._hold((number, -1))
                self._cells[key] = ((number, -1), 0)
            elif treatment is Treatment.SPILL:
                self._spilled += storage.nbytes
                self._cells[key] = (None, -1)

    # -- backward ------------------------------------------------------------------------------------------------

    def _backward(self) -> None:
        for event in self._tape.backward:
            self._live, self._gradients = event.live, event.gradients
            if event.kind == "need":
                key = (event.storage, event.saved_at)
                self._bring(event.storage, self._plan.treatments[key][1])
                self._load(self._plan.needs[key].turnover if key in self._plan.needs else 0)
            elif event.kind == "done":
                self._done(event.storage, self._plan.treatments[(event.storage, event.saved_at)][1])
            self._note(1, event.scratch, "")

    def _bring(self, number: int, unit: int) -> None:
        key = (number, unit)
        while key not in self._cells:
            index = self._frame_of_unit[unit]
            if index not in self._frames:
                return
            self._replay(self._plan.frames[index], self._frames.pop(index))
        copy, packed = self._cells[key]
        if copy is None:  # restored, or read back
            self._extra -= max(packed, 0)
            fresh = (number, -2 - unit)
            self._hold(fresh)
            self._cells[key] = (fresh, 0)

    def _replay(self, frame: Frame, held: dict[int, _Copy]) -> None:
        there = dict(held)
        for copy in there.values():
            if self._plan.frames[frame.index].spilled:
                self._hold(copy)
        for index, frees in zip(frame.program.ops, frame.program.frees, strict=True):
            made = self._tape.ops[index].created
            self._load(self._turnover(index))
            fresh = [number for number in made if number not in frame.program.inputs]
            for number in fresh:
                there[number] = (number, frame.index)
                self._hold(there[number])
            passing = sum(self._tape.storages[number].nbytes for number in made) - sum(
                self._tape.storages[number].nbytes for number in fresh
            )
            self._note(1, passing + self._tape.ops[index].scratch, self._tape.ops[index].module)
            for number in frees:
                if number in there:
                    self._release(there.pop(number))
        for fill in frame.fills:
            key = (fill.number, fill.unit)
            if key in self._cells or fill.number not in there or self._savings.get(key, 0) <= 0:
                continue
            shrinks = self._tape.storages[fill.number].shrinks
            if fill.compact and shrinks:
                self._extra += shrinks
                self._cells[key] = (None, shrinks)
            else:
                self._hold(there[fill.number])
                self._cells[key] = (there[fill.number], 0)
        for index in frame.inner:
            inner = self._plan.frames[index]
            self._frames[index] = {n: there[n] for n in inner.program.inputs if n in there}
            for copy in self._frames[index].values():
                self._hold(copy)
            for unit in range(inner.start, inner.stop):
                self._frame_of_unit[unit] = index
        for copy in there.values():
            self._release(copy)

    def _done(self, number: int, unit: int) -> None:
        key = (number, unit)
        self._savings[key] -= 1
        if self._savings[key]:
            return
        copy, packed = self._cells.pop(key, (None, 0))
        if copy is not None:
            self._release(copy)
        else:
            self._extra -= max(packed, 0)
