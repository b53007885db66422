"""Two meters of the bytes a step holds, and a watch that compares gradients.

Both meters keep a :class:`Ledger`. :class:`LiveStorages` sees the storage of every tensor that an operator returns,
from the moment it is entered: tensors exactly, but neither a kernel's scratch memory nor what compiled code allocates.
:func:`allocator_ledger` reads torch's profiler, which hears of every block of the CPU allocator, whoever asked for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import resource
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MARK = "narrowboat-benchmark: gradients are complete"


@dataclass(slots=True)
class Ledger:
    """Bytes taken and given back, in order.

    Attributes:
        start: bytes held before the first entry.
        entries: (number, bytes): bytes taken under that number, or, negative, given back; number -1 for bytes that
            were taken before the ledger began.
        live: of each key that holds bytes, its number and its bytes.
        kept: numbers that are no activations: parameters, buffers, gradients, state of the optimizer.
    """

    start: int = 0
    entries: list[tuple[int, int]] = field(default_factory=list)
    live: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    _next: int = 0

    def take(self, key: Hashable, nbytes: int) -> None:
        """``key`` now holds ``nbytes``."""
        self.live[key] = (self._next, nbytes)
        self.entries.append((self._next, nbytes))
        self._next += 1

    def free(self, key: Hashable, nbytes: int) -> None:
        """``key`` has given its bytes back."""
        number, held = self.live.pop(key, (-1, nbytes))
        self.entries.append((number, -held))

    def keep(self, keys: Iterable[Hashable]) -> None:
        """What ``keys`` hold now is no activation, and never was."""
        self.kept.update(self.live[key][0] for key in keys if key in self.live)

    def position(self) -> int:
        """A place in the ledger for :meth:`peak`."""
        return len(self.entries)

    def peak(self, since: int = 0, *, kept: bool = True, share: float = 1.0) -> int:
        """The most bytes held at one time from the position ``since`` on.

        Args:
            since: a :meth:`position`.
            kept: count what was there before the ledger and what was :meth:`keep`-ed; without it, activations alone.
            share: of the activations that are counted, at every moment.
        """
        held = self.start if kept else 0
        activations = 0
        highest = held
        for place, (number, nbytes) in enumerate(self.entries):
            if place == since:
                highest = int(held + share * activations)
            if number >= 0 and number not in self.kept:
                activations += nbytes
            elif kept:
                held += nbytes
            highest = max(highest, int(held + share * activations))
        return highest if since < len(self.entries) else int(held + share * activations)


class LiveStorages(TorchDispatchMode):
    """Enters in ``ledger`` every CPU storage that an operator returns, until it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        if storage is None or storage._cdata in self.ledger.live:
            return
        key, nbytes = storage._cdata, storage.nbytes()
        self.ledger.take(key, nbytes)
        weakref.finalize(storage, self.ledger.free, key, nbytes).atexit = False

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are no activations."""
        storages = [_storage(tensor) for tensor in tensors]
        self.ledger.keep(storage._cdata for storage in storages if storage is not None)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The storage in this process's own memory; None for stand-ins and for mapped files."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
    return storage if storage.device.type == "cpu" and storage.filename is None else None


def allocator_ledger(run: Callable[[], None], watch: GradientWatch, start: int) -> Ledger:
    """Run ``run`` once under the profiler; every block that the CPU allocator gave or got back meanwhile.

    Args:
        run: one step.
        watch: has told, when ``run`` returns, where the gradients were as the optimizer began.
        start: bytes of tensors held before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events: list[tuple[int, Any]] = []
    nodes = list(profiled.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.tag.name == "Allocation" or node.name == _MARK:
            events.append((node.start_time_ns, node))
    ledger = Ledger(start)
    places = iter(watch.places)
    for _, node in sorted(events, key=lambda event: event[0]):
        if node.name == _MARK:
            ledger.keep(next(places))
            continue
        block = node.extra_fields
        if block.alloc_size > 0:
            ledger.take(block.ptr, block.alloc_size)
        else:
            ledger.free(block.ptr, -block.alloc_size)
    return ledger


@dataclass(frozen=True, slots=True)
class Static:
    """Bytes that are there whatever the batch: of tensors in this process's own memory, each storage once."""

    parameters: int
    buffers: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.gradients + self.optimizer


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors of an optimizer's state."""
    return [leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, torch.Tensor)]


def static_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> Static:
    """What a module and its optimizer hold after a step; gradients count whether they are there now or not."""
    parameters = list(module.parameters())
    return Static(
        parameters=_nbytes(parameters),
        buffers=_nbytes(module.buffers()),
        gradients=sum(parameter.nbytes for parameter in parameters if parameter.requires_grad),
        optimizer=_nbytes(tensor for tensor in state_tensors(optimizer) if tensor.ndim),
    )


def held_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers, gradients and optimizer state that are there now."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return _nbytes([*module.parameters(), *module.buffers(), *gradients, *state_tensors(optimizer)])


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = [_storage(tensor) for tensor in tensors]
    return sum({s._cdata: s.nbytes() for s in storages if s is not None}.values())


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """Without the data limit: what the benchmark itself needs is not the subject's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of the bytes of all tensors, in order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(_bytes(tensor))
    return sha.hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


class GradientWatch:
    """Looks at the gradients whenever the optimizer is about to use them, also where it does so in portions.

    Args:
        module: whose gradients.
        optimizer: what is watched.
        reference: file of the plain step's gradients: written where ``write``, else compared with.
        write: this is the plain step.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, reference: Path, write: bool) -> None:
        self.places: list[list[int]] = []
        self.live: LiveStorages | None = None
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._reference, self._write = reference, write
        self._digests: dict[str, str] | None = {}
        self._squares = np.zeros(2)  # of the difference, of the reference
        optimizer.register_step_pre_hook(lambda *_: self._look())

    def _look(self) -> None:
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        with record_function(_MARK):
            self.places.append([gradient.untyped_storage().data_ptr() for gradient in gradients.values()])
        if self.live is not None:
            self.live.keep(gradients.values())
        if self._digests is None:
            return
        with unlimited():
            for name, gradient in gradients.items():
                self._digests[name] = digest([gradient])
                self._compare(name, gradient)

    def _compare(self, name: str, gradient: torch.Tensor) -> None:
        path = self._reference / f"{name}.npy"
        if self._write:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, gradient.numpy())
        elif path.exists():
            wanted = np.load(path).astype(np.float64)
            self._squares += ((gradient.numpy() - wanted) ** 2).sum(), (wanted**2).sum()

    def told(self) -> dict[str, Any]:
        """Digest and distance of the first step's gradients; from here on only their places are noted."""
        assert self._digests is not None, "told once already"
        digests, self._digests = self._digests, None
        self.places.clear()
        seen = len(digests) == len(self._parameters)
        whole = hashlib.sha256("".join(f"{n}{digests[n]}" for n in sorted(digests)).encode()).hexdigest()[:16]
        difference, reference = self._squares
        return {
            "gradients": whole if seen else None,
            "difference": float(np.sqrt(difference / reference)) if seen and reference and not self._write else None,
        }
