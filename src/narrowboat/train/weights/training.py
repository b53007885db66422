"""``TrainingWeights``: a model's weights stay on storage while it is trained, in forward and in backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from narrowboat.arena.slab import PAGE
from narrowboat.arena.slot import Weight
from narrowboat.arena.standin import is_standin, slot_of
from narrowboat.checkpoint import WeightsIndex, open_index
from narrowboat.errors import UsageError, WeightsFormatError
from narrowboat.machine.storage_choice import load_storage_choice
from narrowboat.profile.skeleton import tensor_names
from narrowboat.quantities import parse_bytes
from narrowboat.stream.reader import Extent, WeightsFile
from narrowboat.train.weights.export import save_weights
from narrowboat.train.weights.match import Matching, load, match, put_on_storage, take_over, used_together
from narrowboat.train.weights.room import page_up
from narrowboat.train.weights.stored import StoredParameters
from narrowboat.train.weights.window import Window


class TrainingWeights:
    """Weights on storage for a model that is trained. Make one with :meth:`of`. A context manager: leaving closes.

    Every weight on storage is a stand-in for good: autograd saves stand-ins, and an operator that touches one, in
    forward, in backward or when something is computed again, finds its bytes in a window of a fixed size. The bits
    are those of training in memory.

    Attributes:
        model: as given.
        window: where the weights take turns; ``window.order`` tells what it has learnt.
        stored: the trained weights that are on storage too; None where there are none.
        loaded_bytes: bytes of parameters and buffers that were loaded into memory, beside the window.
    """

    def __init__(
        self,
        model: nn.Module,
        window: Window,
        weights: list[Weight],
        stored: StoredParameters | None,
        loaded_bytes: int,
        cleanup: Callable[[], None] | None,
    ) -> None:
        self.model = model
        self.window = window
        self.stored = stored
        self.loaded_bytes = loaded_bytes
        self._weights = weights
        self._cleanup = cleanup

    @classmethod
    def of(
        cls,
        model: nn.Module,
        source: str | Path | WeightsIndex | None,
        budget: int | str,
        *,
        store: str | Path | None = None,
        resume: bool = False,
        generation: int | None = None,
        temporary: bool = False,
        io: str = "auto",
    ) -> TrainingWeights:
        """Put a model's weights on storage for training.

        - Frozen parameters (``requires_grad`` false) become stand-ins for their bytes in ``source``; what memory
          they had is let go.
        - Parameters in memory that are trained (adapters, a new head), and all that ``source`` does not have, are
          left alone.
        - Parameters without memory that are trained are loaded; or, with ``store``, they too are stand-ins, and what
          the optimizer makes of them goes to that folder.
        - Buffers are in memory; those without are loaded.

        Args:
            model: a skeleton on meta, a module in memory, or a streamed model: its session is closed then, and its
                weights file is the source.
            source: a weights file or folder, or an index of one. None for a streamed model: its own.
            budget: bytes for the window and the reader's staging buffers: an int, or such as ``"300MiB"``.
            store: a folder for trained weights.
            resume: go on from the last whole step in ``store``, if there is one.
            generation: number of the commit to go on from, which the caller has checked; the last one by default.
            temporary: what is in ``store`` has no name and goes with this process.
            io: ``"auto"``, or ``"buffered"`` to read through the page cache.

        Raises:
            BudgetError: the budget is below what one operator needs; ``.minimum`` is enough for those foreseen.
            WeightsMismatchError: the source does not have what the model lacks.
            WeightsFormatError: a weight is not contiguous in its file: pack it.
            WeightsNotFoundError, StorageError, SpillError: a file cannot be opened.
            UsageError: no source.
        """
        nbytes = parse_bytes(budget, what="budget")
        _let_go(model)
        streamed_from, cleanup = take_over(model)
        if source is None:
            source = streamed_from
        if source is None:
            raise UsageError("source is missing: give the weights file or folder (a streamed model has its own)")
        index = source if isinstance(source, WeightsIndex) else open_index(source)
        found = match(model, index)
        weights = _weights_of(found, trained=store is not None)
        for weight, _ in weights:
            if not weight.entry.contiguous:
                raise WeightsFormatError(
                    f"{weight.entry.file}: tensor {weight.entry.name!r} is not contiguous there, so it cannot be used "
                    f"from storage; run: narrowboat pack {weight.entry.file} -o model.safetensors"
                )
        files = [WeightsFile(p, s, direct=io != "buffered") for p, s in zip(index.files, index.stamps, strict=True)]
        stored: StoredParameters | None = None
        window: Window | None = None
        try:
            numbers = {str(file.path): number for number, file in enumerate(files)}
            trained = [weight for weight, _ in weights[len(found.frozen) :]]
            if trained and store is not None:
                stored = StoredParameters(
                    store, trained, len(files), resume=resume, generation=generation, temporary=temporary
                )
                files.append(stored.records.as_file())

            def extents_of(weight: Weight, target: int) -> list[Extent]:
                if stored is not None and weight in stored and weight.name in stored.records:
                    return [stored.records.extent(weight.name, stored.file_number, target)]
                return source_extents(weight, target, numbers, packed=index.packed)

            window = Window(
                files,
                [weight for weight, _ in weights],
                used_together(model, weights),
                extents_of,
                nbytes,
                load_storage_choice(index.files[0]),
                staged=not index.packed,
            )
            loaded = load(index, [*found.buffers, *([] if store is not None else found.trained)])
            for weight, tensors in weights:
                for tensor in tensors:
                    put_on_storage(weight, tensor)
        except BaseException:
            for weight, _ in weights:
                for slot in weight.slots:
                    slot.release()
            if window is not None:
                window.close("it was never opened")
            for file in files:
                file.close()
            if stored is not None:
                stored.close()
            raise
        if stored is not None:
            stored.use(window)
        return cls(model, window, [weight for weight, _ in weights], stored, loaded, cleanup)

    # -- steps -------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A training step begins.

        Raises:
            WeightsChangedError: the weights file was replaced, altered or truncated.
        """
        self.window.begin_step()

    def end_step(self) -> None:
        """The step is over as a whole, the optimizer's part included. One that is repeated is begun again instead."""
        self.window.end_step()

    # -- bytes -------------------------------------------------------------------------------------

    @property
    def minimum(self) -> int:
        """The smallest budget in bytes: the largest set of weights that one operator uses, and staging."""
        return self.window.minimum

    @property
    def budget(self) -> int:
        """Bytes for the window and staging; to be set between steps. Raises BudgetError below ``minimum``."""
        return self.window.budget

    @budget.setter
    def budget(self, value: int | str) -> None:
        self.window.budget = parse_bytes(value, what="budget")

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights on storage, in whole pages: a window of that size never reads twice."""
        return sum(page_up(weight.entry.nbytes) for weight in self._weights)

    @property
    def steps_done(self) -> int:
        """Optimizer steps that the trained weights on storage hold, all runs together; 0 where there are none."""
        return self.stored.steps if self.stored is not None else 0

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights in memory now."""
        return self.window.resident_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes read from storage so far."""
        return self.window.bytes_read

    @property
    def peak_bytes(self) -> int:
        """Most bytes of weights that were in memory at once."""
        return self.window.peak_bytes

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model's weights as they are now to a safetensors file, one tensor at a time.

        Raises:
            UsageError: ``path`` exists, or is a folder.
            StorageError: disk full, or the storage failed; nothing is left behind.
        """
        save_weights(self.model, Path(path), overwrite=overwrite)

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the memory back. A weight on storage that is touched afterwards says so; idempotent."""
        if self.stored is not None:
            self.stored.close()
        self.window.close(
            "the weights that this model was trained with from storage are closed; make them anew with "
            "TrainingWeights.of(...), or load the model"
        )
        if self._cleanup is not None:
            self._cleanup()
            self._cleanup = None

    def dismantle(self) -> None:
        """Close, and make the model an ordinary skeleton: what was on storage is on meta then."""
        self.close()
        for weight in self._weights:
            for slot in weight.slots:
                slot.release()
            weight.slots.clear()

    def __enter__(self) -> TrainingWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _let_go(model: nn.Module) -> None:
    """Make stand-ins of a window that is closed ordinary tensors on meta."""
    for tensor, names, _ in list(tensor_names(model).values()):
        if is_standin(tensor):
            slot = slot_of(tensor)
            if isinstance(slot.weight.owner, Window):
                if not slot.weight.owner.closed:
                    raise UsageError(f"weight {names[0]!r} is on storage for training already; close that first")
                slot.release()


def _weights_of(found: Matching, *, trained: bool) -> list[tuple[Weight, list[torch.Tensor]]]:
    """What becomes stand-ins: frozen weights, then the trained ones."""
    rows = [(name, entry, tensors) for name, entry, tensors in found.frozen]
    if trained:
        rows += [(name, entry, [tensor]) for name, entry, tensor in found.trained]
    return [(Weight(i, name, entry), tensors) for i, (name, entry, tensors) in enumerate(rows)]


def source_extents(weight: Weight, target: int, numbers: dict[str, int], *, packed: bool) -> list[Extent]:
    """What to read for a weight; whole pages where it begins on one and ends before the next tensor's page."""
    extents = []
    for at, piece in weight.entry.cut(0, weight.entry.nbytes):
        whole = packed and piece.offset % PAGE == 0 and not weight.entry.pieces
        nbytes = page_up(piece.nbytes) if whole else piece.nbytes
        extents.append(Extent(numbers[str(piece.file)], piece.offset, nbytes, target + at))
    return extents
