"""Where a saved storage is while it waits for its backward, and what autograd's graph holds instead of a tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from narrowboat.errors import ReplayError
from narrowboat.train.tape.compact import Compacted, compact
from narrowboat.train.tape.encoded import Ref
from narrowboat.train.tape.frames import NOTHING, Takes

if TYPE_CHECKING:
    from narrowboat.train.tape.run import TapeRun


class Pool(Protocol):
    """Storages on disk (``train.spill.SpillPool``)."""

    def write(self, storage: torch.UntypedStorage) -> Any:
        """Queue a storage; gives a ticket."""
        ...

    def read(self, ticket: Any) -> torch.UntypedStorage:
        """The storage back."""
        ...

    def prefetch(self, ticket: Any) -> Any:
        """Begin to read it."""
        ...

    def release(self, ticket: Any) -> None:
        """Let its place go."""


class Place:
    """One storage on disk, shared by the cells of several units; let go with the last of them."""

    __slots__ = ("__weakref__", "nbytes", "pool", "ticket")

    def __init__(self, pool: Pool, storage: torch.UntypedStorage) -> None:
        self.pool = pool
        self.nbytes = storage.nbytes()
        self.ticket = pool.write(storage)

    def __del__(self) -> None:
        if hasattr(self, "ticket"):
            self.pool.release(self.ticket)

    def prefetch(self) -> None:
        """Begin to read it."""
        self.pool.prefetch(self.ticket)


class Cell:
    """One saved storage of one unit, shared by everything in the graph that saved it.

    Attributes:
        number: the storage.
        unit: to which its saving counts.
        dtype: of the tensor that was saved.
        storage: its bytes, if they are in memory as they were.
        place: where on disk it is; None if it is not.
    """

    __slots__ = ("__weakref__", "_packed", "dtype", "number", "place", "storage", "unit")

    def __init__(self, number: int, unit: int, dtype: torch.dtype) -> None:
        self.number = number
        self.unit = unit
        self.dtype = dtype
        self.storage: torch.UntypedStorage | None = None
        self.place: Place | None = None
        self._packed: Compacted | None = None

    def keep(self, storage: torch.UntypedStorage, *, compacted: bool = False) -> None:
        """Hold its bytes, in fewer of them if asked and possible."""
        if compacted:
            itemsize = self.dtype.itemsize
            flat = torch.empty(0, dtype=self.dtype, device=storage.device).set_(
                storage, 0, (storage.nbytes() // itemsize,), (1,)
            )
            self._packed = compact(flat)
        if self._packed is None:
            self.storage = storage

    @property
    def here(self) -> bool:
        """Whether it can be had without a replay."""
        return self.storage is not None or self._packed is not None or self.place is not None

    @property
    def unpacked_bytes(self) -> int:
        """What ``get`` will take to have it as it was."""
        if self.storage is not None:
            return 0
        if self._packed is not None:
            return math.prod(self._packed.shape) * self._packed.dtype.itemsize
        return self.place.nbytes if self.place is not None else 0

    def get(self) -> torch.UntypedStorage:
        """Its bytes. Raises ReplayError if a replay is needed first."""
        if self.storage is None:
            if self._packed is not None:
                self.storage, self._packed = self._packed.restore().untyped_storage(), None
            elif self.place is not None:
                self.storage = self.place.pool.read(self.place.ticket)
                self.place = None
            else:
                raise ReplayError(f"storage {self.number} of unit {self.unit} was dropped and not computed again")
        return self.storage

    def drop(self) -> None:
        """Let go of its bytes, wherever they are."""
        self.storage = self._packed = self.place = None


class Kept:
    """A saved tensor that stays as it is; checked for writes as autograd would.

    Attributes:
        takes: what the backward pass takes next when it has asked for it.
    """

    __slots__ = ("takes", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, takes: Takes = NOTHING) -> None:
        self.takes = takes
        # Without its history: a result that held its own node would never be freed.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def unpack(self) -> torch.Tensor:
        """The tensor. Raises RuntimeError, as plain autograd does, if it was written to."""
        check_version(self.tensor, self.version, self.tensor.shape)
        return self.tensor


def check_version(tensor: torch.Tensor, version: int, shape: Sequence[int]) -> None:
    """Raise RuntimeError, as plain autograd does, if ``tensor`` was written to since it had ``version``."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {list(shape)} is at version {tensor._version}; expected version {version} instead "
            "(seen by narrowboat's tape)"
        )


def witness(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of no bytes that shares the version of ``tensor``, which need not live on."""
    alias = tensor.detach()
    alias.data = _nothing(tensor.dtype, tensor.device)
    return alias


@lru_cache(maxsize=64)
def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device)


class Held:
    """A saved tensor as a view of a cell.

    Attributes:
        takes: what the backward pass takes next when it has asked for it.
    """

    __slots__ = ("bits", "cell", "ref", "run", "takes", "version", "witness")

    def __init__(
        self, cell: Cell, ref: Ref, run: TapeRun, saved: torch.Tensor, takes: Takes = NOTHING, *, check: bool = False
    ) -> None:
        self.takes = takes
        self.cell = cell
        self.ref = ref
        self.run = run
        self.witness = witness(saved)
        self.version = saved._version
        self.bits = fingerprint(saved) if check else b""

    def unpack(self) -> torch.Tensor:
        """The tensor, after whatever has to run first. Raises RuntimeError if it was written to since."""
        check_version(self.witness, self.version, self.ref.size)
        self.run.bring(self.cell)
        tensor = self.ref.over(self.cell.get())
        if self.bits and fingerprint(tensor) != self.bits:
            self.run.wrong.add(self.cell.number)
        return tensor


def fingerprint(tensor: torch.Tensor) -> bytes:
    """A few bytes that differ where any bit of two tensors does."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(flat.numpy().data, digest_size=16).digest()
