"""The load engine: one order at a time, in a thread of its own; the only one that touches the swap space."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from narrowboat.errors import NarrowboatError
from narrowboat.stream.reader import Job as ReadJob
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.execute.space import Place, SwapSpace


@dataclass(eq=False)
class Order:
    """Have a block in.

    Attributes:
        model: whose.
        block: which.
        error: why it is not in; None if it is.
        given_up: before it was in.
    """

    model: TaskModel
    block: int
    error: NarrowboatError | None = None
    given_up: bool = False
    _read: ReadJob | None = field(default=None, repr=False)
    _cancel: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def place(self) -> Place | None:
        """Where the block lies; None if it is resident."""
        return self.model.places[self.block]

    def give_up(self) -> None:
        """From the dispatcher: end within a chunk."""
        self._cancel.set()
        if self._read is not None:
            self.model.reader.cancel(self._read)


class _Errand:
    """Something that only the loader may do."""

    def __init__(self, task: Callable[[], None]) -> None:
        self._task = task
        self.done = threading.Event()
        self.error: NarrowboatError | None = None

    def run(self) -> None:
        try:
            self._task()
        except NarrowboatError as error:
            self.error = error
        finally:
            self.done.set()


class Loader(threading.Thread):
    """Carries out orders.

    Args:
        space: where blocks go.
        begin: called in this thread when it starts.
        ended: called when an order has ended, in this thread.
    """

    def __init__(self, space: SwapSpace, begin: Callable[[], None], ended: Callable[[Order], None]) -> None:
        super().__init__(name="narrowboat-loader", daemon=True)
        self._space, self._begin, self._ended = space, begin, ended
        self._orders: queue.SimpleQueue[Order | Place | _Errand | None] = queue.SimpleQueue()

    def order(self, order: Order) -> None:
        """Have a block in, after what was asked for before."""
        self._orders.put(order)

    def let_go(self, place: Place) -> None:
        """A block is not used any more."""
        self._orders.put(place)

    def do(self, task: Callable[[], None]) -> None:
        """Have it done in this thread, after what was asked for before; and wait for it."""
        errand = _Errand(task)
        self._orders.put(errand)
        errand.done.wait()
        if errand.error is not None:
            raise errand.error

    def stop(self) -> None:
        """End after the orders given."""
        self._orders.put(None)

    def run(self) -> None:
        """The thread."""
        self._begin()
        while (order := self._orders.get()) is not None:
            if isinstance(order, Place):
                self._space.let_go(order)
                continue
            if isinstance(order, _Errand):
                order.run()
                continue
            try:
                self._bring(order)
            except NarrowboatError as error:
                order.error = error
            except Exception as error:  # a loader that dies silently would leave its job waiting for ever
                order.error = NarrowboatError(f"loading failed: {type(error).__name__}: {error}")
            self._ended(order)

    def _bring(self, order: Order) -> None:
        place = order.place
        if place is None or self._space.hold(place):
            return
        try:
            read = order._read = order.model.submit(order.block)
            if order._cancel.is_set():
                order.model.reader.cancel(read)
            order.model.reader.wait(read)
            place.valid = True
        except NarrowboatError:
            self._space.let_go(place)
            if order._cancel.is_set():
                order.given_up = True
                return
            raise
