"""Gradients on storage between micro-batches, where memory cannot hold those of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils.hooks import RemovableHandle

from narrowboat.errors import TrainingError
from narrowboat.train.state.bucketed import Bucket, partition
from narrowboat.train.state.buckets import BucketFile
from narrowboat.train.state.layout import Record, record_bytes
from narrowboat.train.state.predict import nbytes_of

Factor = float | torch.Tensor


class GradientStore:
    """Adds up each parameter's gradients of several backward passes on storage, with the bits of ``p.grad``.

    A gradient is taken from ``p.grad`` when it is complete, waits until those of its bucket are there, and is then
    added to the sum so far: first the second to the first, then the third to that, as torch does in place. Memory:
    about four buckets. The file has no name: nothing is left behind, whatever ends the process.

    Args:
        parameters: whose gradients; in the order in which ``clip_grad_norm_`` would be given them. Frozen ones in no
            bucket are left out.
        folder: where the file goes.
        bucket_bytes: gradients that are read and written at a time.
        buckets: how the parameters are put together, such as a bucketed optimizer's; parameters in none of them get
            buckets of their own. By default neighbours.
        norm_type: norms of this order are taken on the way, so that :meth:`norm` need not read again; None for none.

    Attributes:
        buckets: the parameters of each bucket.

    Raises:
        SpillError: the folder cannot be used, or is full; nothing is left behind.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        folder: str | Path,
        *,
        bucket_bytes: int,
        buckets: Sequence[Bucket] = (),
        norm_type: float | None = 2.0,
    ) -> None:
        self._parameters = list(dict.fromkeys(parameters))
        bucketed = {parameter for bucket in buckets for parameter in bucket}
        rest = [p for p in self._parameters if p.requires_grad and p not in bucketed]
        self.buckets = (*buckets, *partition(rest, [nbytes_of([p]) for p in rest], bucket_bytes))
        self._place = {p: (index, i) for index, bucket in enumerate(self.buckets) for i, p in enumerate(bucket)}
        self._norm_type = norm_type
        self._limit = 2 * bucket_bytes
        sizes = {str(index): record_bytes(bucket) for index, bucket in enumerate(self.buckets)}
        usual = max((size for size in sizes.values() if size <= 2 * bucket_bytes), default=bucket_bytes)
        self._file = BucketFile(folder, "gradients", sizes, temporary=True, generations=1, memory=3 * usual)
        self._handles: list[RemovableHandle] = []
        self._waiting: dict[int, dict[torch.Tensor, torch.Tensor]] = {}
        self._stored: dict[int, set[torch.Tensor]] = {}
        self._norms: dict[torch.Tensor, torch.Tensor] = {}
        self._factors: list[Factor] = []

    @property
    def bytes_written(self) -> int:
        """Bytes written so far: the wear."""
        return self._file.bytes_written

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._file.bytes_read

    def attach(self) -> None:
        """From now on every backward pass leaves its gradients here, and none in ``p.grad``."""
        if not self._handles:
            self._handles = [
                parameter.register_post_accumulate_grad_hook(self.accept)
                for parameter in self._place
                if parameter.requires_grad
            ]

    def detach(self) -> None:
        """Leave gradients in ``p.grad`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def accept(self, parameter: torch.Tensor) -> None:
        """Take the parameter's gradient of one backward pass, which is complete, out of ``parameter.grad``.

        Raises:
            SpillError: the storage failed.
            TrainingError: the gradient is sparse, or was scaled by then.
        """
        index = self.hold(parameter)
        if index is None:
            return
        if len(self._waiting[index]) == sum(each.requires_grad for each in self.buckets[index]):
            self._flush(index)
        elif self.waiting_bytes > self._limit:
            # Buckets that fill at the same time, such as by a network of several branches.
            self._flush(max(self._waiting, key=lambda i: nbytes_of(self._waiting[i].values())))

    def hold(self, parameter: torch.Tensor) -> int | None:
        """As :meth:`accept`, but the gradient waits in memory; the number of its bucket, None without a gradient."""
        gradient = parameter.grad
        if gradient is None:
            return None
        if gradient.layout is not torch.strided:
            raise TrainingError("sparse gradients cannot be kept on storage; make the embedding dense (sparse=False)")
        if self._factors:
            raise TrainingError("gradients were scaled already; clear() them before the next backward pass")
        parameter.grad = None
        index, _ = self._place[parameter]
        waiting = self._waiting.setdefault(index, {})
        if parameter in waiting:
            waiting[parameter].add_(gradient)
        else:
            waiting[parameter] = gradient.detach()
        if len(waiting) == 1:
            self.prefetch(index)
        return index

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the gradients that wait in memory for the rest of their bucket."""
        return sum(nbytes_of(waiting.values()) for waiting in self._waiting.values())

    def has(self, index: int) -> bool:
        """Whether any parameter of the bucket has a gradient here."""
        return bool(self._waiting.get(index) or self._stored.get(index))

    def flush(self) -> None:
        """Write out what waits; after each backward pass, so that nothing of it stays in memory.

        Raises:
            SpillError: the storage failed.
        """
        for index in list(self._waiting):
            self._flush(index)

    @torch.no_grad()
    def _flush(self, index: int) -> None:
        record, sums = self._sums(index)
        if self._norm_type is not None:
            for parameter, gradient in sums.items():
                self._norms[parameter] = torch.linalg.vector_norm(gradient, self._norm_type)
        self._stored[index] = set(sums)
        tensors = {str(i): sums[p] for i, p in enumerate(self.buckets[index]) if p in sums}
        self._file.write(str(index), tensors, record)

    def _sums(self, index: int) -> tuple[Record | None, dict[torch.Tensor, torch.Tensor]]:
        """What is stored of the bucket with what waits added to it, in memory; nothing waits any more."""
        record, sums = self._fetch(index)
        waiting = self._waiting.pop(index, {})
        for parameter in list(waiting):
            gradient = waiting.pop(parameter)
            if parameter in sums:
                sums[parameter].add_(gradient)
            else:
                sums[parameter] = gradient
        return record, sums

    def _fetch(self, index: int) -> tuple[Record | None, dict[torch.Tensor, torch.Tensor]]:
        if not self._stored.get(index):
            return None, {}
        record = self._file.read(str(index))
        return record, {self.buckets[index][int(place)]: tensor for place, tensor in record.tensors.items()}

    def prefetch(self, index: int) -> None:
        """Bucket ``index`` is read soon."""
        if self._stored.get(index):
            self._file.prefetch(str(index))

    @torch.no_grad()
    def read(self, index: int) -> Record | None:
        """Put the sums of a bucket, scaled, into ``p.grad`` of its parameters.

        Returns:
            What to give to :meth:`release` when they have been used, or None.

        Raises:
            SpillError: the storage failed.
        """
        record, sums = self._sums(index)
        for parameter, gradient in sums.items():
            for factor in self._factors:
                gradient.mul_(_on(factor, gradient))
            parameter.grad = gradient
        return record

    def release(self, index: int, record: Record | None) -> None:
        """The gradients of ``read`` are not needed any more: forget them, and give their memory back."""
        for parameter in self.buckets[index]:
            parameter.grad = None
            self._norms.pop(parameter, None)
        self._stored.pop(index, None)
        if record is not None:
            self._file.release(record)

    @torch.no_grad()
    def norm(self, norm_type: float = 2.0) -> torch.Tensor:
        """The norm of all gradients as one vector, as ``torch.nn.utils.clip_grad_norm_`` computes it.

        That is the norm of the norms of the single gradients, in the order of the parameters. What waits is written
        out first; nothing is read if the norms were taken on the way.

        Raises:
            SpillError: the storage failed.
        """
        self.flush()
        norms = self._norms
        if self._factors or norm_type != self._norm_type:
            norms = {}
            for index in list(self._stored):
                record, sums = self._fetch(index)
                for parameter, gradient in sums.items():
                    for factor in self._factors:
                        gradient.mul_(_on(factor, gradient))
                    norms[parameter] = torch.linalg.vector_norm(gradient, norm_type)
                if record is not None:
                    self._file.release(record)
        present = [parameter for parameter in self._parameters if parameter in norms]
        if not present:
            return torch.tensor(0.0)
        # torch takes the gradients device by device and dtype by dtype; the order decides the last bits of a sum.
        groups = _group_tensors_by_device_and_dtype([[p.detach() for p in present]], with_indices=True)
        ordered = [norms[present[i]] for _, indices in groups.values() for i in indices]
        return torch.linalg.vector_norm(torch.stack([n.to(present[0].device) for n in ordered]), norm_type)

    def scale(self, factor: Factor) -> None:
        """Multiply all gradients, when they are read; several factors one after the other."""
        self._factors.append(factor)

    def clip(self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> torch.Tensor:
        """As ``torch.nn.utils.clip_grad_norm_``: scale so that the norm is ``max_norm`` at most; the norm before.

        Raises:
            SpillError: the storage failed.
            TrainingError: the norm is not finite, and ``error_if_nonfinite``.
        """
        total = self.norm(norm_type)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise TrainingError(
                f"the gradients' norm of order {norm_type} is {total.item()}: they cannot be clipped; lower the "
                "learning rate, or look for the batch that does it"
            )
        self.scale(torch.clamp(max_norm / (total + 1e-6), max=1.0))
        return total

    def clear(self) -> None:
        """Forget everything: the step was made, failed, or was given up."""
        self._file.drop_reads()
        self._waiting.clear()
        self._stored.clear()
        self._norms.clear()
        self._factors.clear()

    def close(self) -> None:
        """Let go of the parameters and the file."""
        self.detach()
        self.clear()
        self._file.close()


def _on(factor: Factor, gradient: torch.Tensor) -> Factor:
    return factor.to(gradient.device) if isinstance(factor, torch.Tensor) else factor
