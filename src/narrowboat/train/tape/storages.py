"""Numbers for storages: the same storage has the same number for as long as it lives.

Addresses of storages are used again after they die, so each entry dies with its storage (a weak reference to the
storage object, which torch keeps for as long as the storage itself).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

Died = Callable[[int], None]


class StorageNumbers:
    """Gives numbers to storages made inside the pass (0, 1, ...) and to those from outside (-1, -2, ...)."""

    def __init__(self, died: Died | None = None) -> None:
        self._number: dict[int, int] = {}
        self._watch: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._died = died
        self.inside = 0
        self.outside = 0

    def get(self, storage: torch.UntypedStorage) -> int | None:
        """The number of ``storage``, or None if it has none yet."""
        return self._number.get(storage._cdata)

    def require(self, storage: torch.UntypedStorage) -> int:
        """The number of ``storage``, a new one from outside if it has none yet."""
        number = self.get(storage)
        return self.add_outside(storage) if number is None else number

    def add_inside(self, storage: torch.UntypedStorage) -> int:
        """A number for a storage that an operator just made."""
        number = self.inside
        self.inside += 1
        self._enter(storage, number)
        return number

    def add_outside(self, storage: torch.UntypedStorage) -> int:
        """A (negative) number for a storage that was there before."""
        self.outside += 1
        self._enter(storage, -self.outside)
        return -self.outside

    def _enter(self, storage: torch.UntypedStorage, number: int) -> None:
        key = storage._cdata
        self._number[key] = number

        def gone(_: object, key: int = key, number: int = number) -> None:
            if self._number.get(key) == number:
                del self._number[key]
            self._watch.pop(number, None)
            if self._died is not None:
                self._died(number)

        self._watch[number] = weakref.ref(storage, gone)

    def clear(self) -> None:
        """Forget everything; nobody is told of later deaths."""
        self._watch.clear()
        self._number.clear()
        self._died = None
