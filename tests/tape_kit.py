"""Tapes written by hand: what an operator makes, reads and changes, and what autograd saves."""

from __future__ import annotations

from narrowboat.train.tape.facts import Kind
from narrowboat.train.tape.structure import NEVER, BackwardEvent, Tape, TapeOp, TapeStorage


class Hand:
    """Writes a tape operator by operator; storages are numbered as they are made."""

    def __init__(self) -> None:
        self.ops: list[TapeOp] = []
        self.storages: list[TapeStorage] = []

    def op(
        self,
        *reads: int,
        makes: int | None = 100,
        changes: tuple[int, ...] = (),
        kind: Kind = Kind.MAP,
        outside: tuple[int, ...] = (),
        seconds: float = 1.0,
        name: str = "",
    ) -> int:
        """An operator; ``makes`` is the bytes of its result, None for none. Returns the result's number, or -1."""
        index = len(self.ops)
        created: tuple[int, ...] = ()
        if makes is not None:
            created = (len(self.storages),)
            self.storages.append(TapeStorage(len(self.storages), makes, index, index))
        for number in changes:
            self.storages[number].last_write = index
        read = tuple(dict.fromkeys((*reads, *changes)))
        self.ops.append(
            TapeOp(index, name or f"op{index}", kind, "", False, created, read, changes, outside, (), seconds)
        )
        return created[0] if created else -1

    def save(self, *numbers: int) -> None:
        """Autograd saves these now."""
        for number in numbers:
            self.storages[number].saved_at.append(len(self.ops))

    def tape(self) -> Tape:
        """The pass, with a backward that asks in the opposite order and makes no gradients; storages die in time."""
        last = {number: op.index for op in self.ops for number in (*op.created, *op.read)}
        for storage in self.storages:
            storage.dies = last[storage.number] + 1 if storage.number < len(self.storages) - 1 else NEVER
        saved = sorted(((at, s.number) for s in self.storages for at in s.saved_at), reverse=True)
        events = []
        for at, number in saved:
            events += [BackwardEvent("need", number, at, 0), BackwardEvent("done", number, at, 0)]
        return Tape(self.ops, self.storages, events, 1)


def layers(count: int, nbytes: int = 1000) -> Tape:
    """``count`` layers, each of which makes one storage of the one before and saves its input (but for the first)."""
    hand = Hand()
    x = hand.op(makes=nbytes)
    for _ in range(count):
        hand.save(x)
        x = hand.op(x, makes=nbytes)
    return hand.tape()
