"""The load engine: one order at a time, in a thread of its own; the only one that touches the swap space."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from narrowboat.errors import NarrowboatError
from narrowboat.tasks.execute.ground import Ground, HostGround
from narrowboat.tasks.execute.model import TaskModel, Way
from narrowboat.tasks.execute.space import Place, SwapSpace
from narrowboat.tasks.execute.volume import Move, move


@dataclass(eq=False)
class Order:
    """Have a block in.

    Attributes:
        model: whose.
        block: which.
        move: swap by volume instead; None for the whole block.
        error: why it is not in; None if it is.
        given_up: before it was in.
    """

    model: TaskModel
    block: int
    move: Move | None = None
    error: NarrowboatError | None = None
    given_up: bool = False
    _way: Way | None = field(default=None, repr=False)
    _cancel: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def place(self) -> Place | None:
        """Where the block lies; None if it is resident."""
        return self.model.places[self.block]

    def give_up(self) -> None:
        """From the dispatcher: end within a chunk."""
        self._cancel.set()
        if self._way is not None:
            self._way.cancel()

    def bring(self) -> object:
        """In the loader's thread: have it done; returns what that knows then."""
        way = self._way = self.model.way(self.block)
        if self._cancel.is_set():
            way.cancel()
        return way.run()


@dataclass
class _Release:
    """A block is not used any more.

    Attributes:
        place: where it lies; None for one that stays in until it is swapped out.
        known: what the one who says so knows: that its kernels have run, for one.
    """

    place: Place | None
    known: object


class _Errand:
    """Something that only the loader may do."""

    def __init__(self, task: Callable[[], None], known: object) -> None:
        self._task, self.known = task, known
        self.done = threading.Event()
        self.error: NarrowboatError | None = None

    def run(self, hand_over: Callable[[], object]) -> None:
        try:
            self._task()
        except NarrowboatError as error:
            self.error = error
        finally:
            self.known = hand_over()
            self.done.set()


class Loader(threading.Thread):
    """Carries out orders.

    Args:
        space: where blocks go.
        begin: called in this thread when it starts.
        ended: called when an order has ended, in this thread.
        ground: where the tasks run; None for the process's memory.
    """

    def __init__(
        self,
        space: SwapSpace,
        begin: Callable[[], None],
        ended: Callable[[Order], None],
        ground: Ground | None = None,
    ) -> None:
        super().__init__(name="narrowboat-loader", daemon=True)
        self._space, self._begin, self._ended = space, begin, ended
        self._ground: Ground = ground if ground is not None else HostGround()
        self._known = self._ground.hand_over()
        self._orders: queue.SimpleQueue[Order | _Release | _Errand | None] = queue.SimpleQueue()

    def order(self, order: Order) -> None:
        """Have a block in, after what was asked for before."""
        self._orders.put(order)

    def let_go(self, place: Place | None) -> None:
        """A block is not used any more. What the caller knows, this thread then knows too."""
        self._orders.put(_Release(place, self._ground.hand_over()))

    def do(self, task: Callable[[], None]) -> None:
        """Have it done in this thread, after what was asked for before; and wait for it."""
        errand = _Errand(task, self._ground.hand_over())
        self._orders.put(errand)
        errand.done.wait()
        self._ground.take_over(errand.known)
        if errand.error is not None:
            raise errand.error

    def later(self, task: Callable[[], None]) -> None:
        """The same without waiting for it; what it raises is nobody's to hear."""
        self._orders.put(_Errand(task, self._ground.hand_over()))

    def stop(self) -> None:
        """End after the orders given."""
        self._orders.put(None)

    def run(self) -> None:
        """The thread."""
        self._begin()
        self._ground.take_over(self._known)
        while (order := self._orders.get()) is not None:
            if isinstance(order, _Release):
                self._ground.take_over(order.known)
                if order.place is not None:
                    self._space.let_go(order.place)
                continue
            if isinstance(order, _Errand):
                self._ground.take_over(order.known)
                order.run(self._ground.hand_over)
                continue
            try:
                self._bring(order)
            except NarrowboatError as error:
                order.error = error
            except Exception as error:  # a loader that dies silently would leave its job waiting for ever
                order.error = NarrowboatError(f"loading failed: {type(error).__name__}: {error}")
            self._ended(order)
        self._known = self._ground.hand_over()

    def join(self, timeout: float | None = None) -> None:
        """See ``Thread``; the caller then knows what this thread knew."""
        super().join(timeout)
        if not self.is_alive():
            self._ground.take_over(self._known)

    def _bring(self, order: Order) -> None:
        place = order.place
        if order.move is not None:
            move(order.move, place, self._space.pool, order.bring)
            return
        if place is None or self._space.hold(place):
            return
        try:
            place.known = order.bring()
            place.valid = True
        except NarrowboatError:
            self._space.let_go(place)
            if order._cancel.is_set():
                order.given_up = True
                return
            raise
