"""Optimizer state on storage: fetched, stepped and written back one bucket at a time.

For Adam the state is twice the size of the model; here it takes the memory of about three buckets, whatever the model.
On storage it is always that of the last whole step (see :mod:`narrowboat.train.state.buckets`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import types
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from narrowboat.errors import NarrowboatError, TrainingError
from narrowboat.train.state.bucketed import BucketedOptimizer
from narrowboat.train.state.buckets import BucketFile
from narrowboat.train.state.layout import record_bytes
from narrowboat.train.state.stepping import Changes

_VALUES = (int, float, bool, str, type(None))


class _StateElsewhere(defaultdict[Any, Any]):
    """Stands where the state was, so that nobody takes an empty one for the real one."""

    def __missing__(self, key: Any) -> Any:
        raise TrainingError(
            "the optimizer's state is on storage; optimizer.state_dict() reads it (into memory), "
            "release() brings it back for good"
        )

    def __reduce__(self) -> NoReturn:
        raise TrainingError("the optimizer's state is on storage; save optimizer.state_dict(), not the optimizer")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce__()


class StoredOptimizer(BucketedOptimizer):
    """Any optimizer whose update is per parameter, with its state on storage.

    ``optimizer.step()`` of the real optimizer is routed here, so a GradScaler, a scheduler, or a loop that calls it
    goes on working. State that the optimizer has already is moved to storage. Gradients are freed by the step.

    ``optimizer.state_dict()`` works between steps; what it returns holds the whole state in memory
    (``state_bytes(optimizer)`` more for as long as it is kept), as it does for a plain optimizer.
    ``optimizer.load_state_dict()`` holds what it was given and a copy until the state has been written out.

    Parameters are not part of it: what belongs together is to be saved together, and :attr:`commits` tells which
    step the state is of.

    Args:
        optimizer: the real one.
        folder: where the state goes; ``optimizer.records`` and ``optimizer.json`` in it, unless temporary.
        bucket_bytes: see :class:`~narrowboat.train.state.bucketed.BucketedOptimizer`.
        temporary: the file has no name and goes with this process, and nothing is synced; half the space and wear.
        resume: go on from the last whole step in ``folder``, if there is one, with the buckets it was made with.
        generation: number of the commit to go on from, which the caller has checked; see ``BucketFile``.
        run: of whom the commits are; see ``BucketFile``.
        beside: called before a state that was moved or loaded in is committed: commits what belongs with it and
            gives the number of that commit.

    Attributes:
        file: the state at rest; ``file.bytes_written`` is the wear.

    Raises:
        TrainingError: the optimizer's update is not per parameter, its state cannot be kept as bytes, or the folder
            holds the state of another optimizer.
        UsageError: the folder holds state already, and ``resume`` is false.
        SpillError: the folder cannot be used or is full; nothing is left behind, the optimizer is as it was.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        folder: str | Path,
        *,
        bucket_bytes: int,
        temporary: bool = False,
        resume: bool = False,
        generation: int | None = None,
        run: str = "",
        beside: Callable[[], int] | None = None,
    ) -> None:
        if isinstance(optimizer.state, _StateElsewhere):
            raise TrainingError("the optimizer's state is on storage already; release() it first")
        super().__init__(optimizer, bucket_bytes=bucket_bytes)
        if resume and not temporary:
            self._adopt(BucketFile.last_extra(folder, "optimizer"))
        sizes = {
            str(index): record_bytes(tensor for parameter in bucket for tensor in self._predicted[parameter])
            for index, bucket in enumerate(self.buckets)
        }
        self._broken = ""
        self._closed = False
        self._beside = beside
        self.file = BucketFile(
            folder,
            "optimizer",
            sizes,
            fingerprint=self._fingerprint(),
            resume=resume,
            generation=generation,
            run=run,
            temporary=temporary,
            generations=1 if temporary else 2,
            memory=3 * max((size for size in sizes.values() if size <= 2 * bucket_bytes), default=bucket_bytes),
        )
        self._values: dict[str, dict[str, Any]] = dict(self.file.extra.get("values", {}))
        self._predicted = {}
        self._known = set(self._parameters)
        held = optimizer.state
        try:
            if self.file.step == 0:
                self._store_all()
            elif held:
                raise TrainingError(
                    f"{folder} holds the state of step {self.file.step}, and the optimizer has a state of its own: "
                    "resume with a new optimizer, or name another folder"
                )
            self._hook()
        except BaseException:
            optimizer.state = held
            self.file.close()
            raise

    @property
    def commits(self) -> int:
        """Number of the last commit: every whole step is one, and so is every state that was moved or loaded in."""
        return self.file.step

    def _adopt(self, extra: dict[str, Any] | None) -> None:
        """Put the parameters into the buckets of the run that is gone on with, whatever ``bucket_bytes`` was then."""
        lengths = (extra or {}).get("buckets", [])
        if sum(lengths) == len(self._parameters):
            rest = iter(self._parameters)
            self.buckets = tuple(tuple(itertools.islice(rest, length)) for length in lengths)

    # -- stepping -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A whole step begins.

        Raises:
            TrainingError: as the base; or the state is closed, or was left in the middle of an earlier step.
        """
        if self._closed:
            raise TrainingError("the state on storage was closed or released")
        if self._broken:
            raise self._is_broken()
        if not isinstance(self.optimizer.state, _StateElsewhere):
            self.optimizer.state = _StateElsewhere(dict)  # a hook of another's stopped a state_dict() half-way
        super().begin()

    def prefetch(self, index: int) -> None:
        """Begin to read the bucket's state, where there is memory for it."""
        self.file.prefetch(str(index))

    def _step(self, index: int) -> Changes:
        optimizer, record = self.optimizer, str(index)
        elsewhere = optimizer.state
        try:
            loaded = self.file.read(record) if record in self.file else None
            optimizer.state = self._state_of(index, loaded.tensors if loaded else {})
            changes = super()._step(index)
            self._values[record], tensors = self._taken(index)
            if tensors or loaded is not None:
                self.file.write(record, tensors, loaded)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            optimizer.state = elsewhere
        return changes

    def finish(self, *, commit: bool = True) -> None:
        """The whole step is done, and counts on storage from here on.

        Args:
            commit: False where :meth:`commit` is called by hand, together with those of other files.

        Raises:
            SpillError: the storage failed; on it the step before still counts.
            TrainingError: no step has begun.
        """
        super().finish()
        self.file.drop_reads()
        if commit:
            self.commit()

    def commit(self, step: int | None = None) -> None:
        """Make the step that was finished the one that counts on storage; errors as :meth:`finish`.

        Args:
            step: its number, where other files are committed with it; one more than the last by default.
        """
        try:
            if step is None:
                step = self._beside() if self._beside is not None else self.file.step + 1
            extra = {"values": self._values, "buckets": [len(bucket) for bucket in self.buckets]}
            self.file.commit(step, extra)
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Something else failed in the middle of a step: nobody goes on before a state was loaded, or made anew."""
        self._broken = f"{type(error).__name__}: {error}"

    def give_up(self) -> None:
        """The step that has begun is not made; errors as the base, after which a state has to be loaded."""
        self.file.drop_reads()
        try:
            super().give_up()
        except TrainingError as error:
            self._broken = str(error)
            raise

    def _is_broken(self) -> TrainingError:
        return TrainingError(
            f"an earlier step failed in the middle ({self._broken}): load a saved state first, or close this one and "
            "go on in a new one from the last whole step (resume=True)"
        )

    def _state_of(self, index: int, tensors: dict[str, torch.Tensor]) -> defaultdict[torch.Tensor, Any]:
        state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        for source in (tensors, self._values.get(str(index), {})):
            for name, value in source.items():
                place, _, key = name.partition(".")
                state[self.buckets[index][int(place)]][key] = value
        return state

    def _taken(self, index: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The bucket's state, out of the optimizer: plain values, and tensors, by place in the bucket and key."""
        values: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for place, parameter in enumerate(self.buckets[index]):
            for key, value in (self.optimizer.state.get(parameter) or {}).items():
                name = f"{place}.{key}"
                if isinstance(value, torch.Tensor):
                    tensors[name] = value
                elif isinstance(value, _VALUES) and isinstance(key, str):
                    values[name] = value
                else:
                    raise TrainingError(
                        f"{type(self.optimizer).__name__} keeps a {type(value).__name__} as {key!r} in its state, "
                        "which cannot be kept on storage; keep its state in memory"
                    )
        return values, tensors

    # -- all of the state at once -------------------------------------------------------------------------------

    def _store_all(self) -> None:
        """Write out the state that the optimizer holds, bucket by bucket."""
        held = self.optimizer.state
        if any(key not in self._known for key in held):
            raise TrainingError(
                f"{type(self.optimizer).__name__} has state that belongs to no parameter; keep its state in memory"
            )
        try:
            for index in range(len(self.buckets)):
                values, tensors = self._taken(index)
                if values or tensors or str(index) in self.file:
                    self._values[str(index)] = values
                    self.file.write(str(index), tensors)
            if held:
                self.commit()
        except BaseException:
            self.file.discard()
            self._values = dict(self.file.extra.get("values", {}))
            raise
        self.optimizer.state = _StateElsewhere(dict)

    def _bring_all(self) -> defaultdict[torch.Tensor, Any]:
        state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        for index in range(len(self.buckets)):
            loaded = self.file.read(str(index)) if str(index) in self.file else None
            tensors = {name: tensor.clone() for name, tensor in loaded.tensors.items()} if loaded else {}
            state.update(self._state_of(index, tensors))
            if loaded is not None:
                self.file.release(loaded)
        return state

    def _before_state_dict(self, optimizer: Optimizer) -> None:
        if self._stepping:
            raise TrainingError("the optimizer is in the middle of a step; take its state_dict() between steps")
        if self._broken:
            raise self._is_broken()
        optimizer.state = self._bring_all()

    def _after_state_dict(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        optimizer.state = _StateElsewhere(dict)

    def _after_load(self, optimizer: Optimizer) -> None:
        self._stepping = False
        self._broken = "a state was being loaded"
        self._store_all()
        self._broken = ""

    # -- in the optimizer's place -------------------------------------------------------------------------------

    def _hook(self) -> None:
        optimizer = self.optimizer
        self._handles = [
            optimizer.register_state_dict_pre_hook(self._before_state_dict),
            optimizer.register_state_dict_post_hook(self._after_state_dict, prepend=True),
            optimizer.register_load_state_dict_post_hook(self._after_load, prepend=True),
        ]
        self._replaced = vars(optimizer).get("step")
        self._routed = types.MethodType(_routed(self, optimizer.step), optimizer)
        optimizer.step = self._routed  # type: ignore[method-assign]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        # Where a scheduler has wrapped it since, it stays, and leads to the optimizer's own step again.
        if vars(self.optimizer).get("step") is self._routed:
            del self.optimizer.step
            if self._replaced is not None:
                self.optimizer.step = self._replaced  # type: ignore[method-assign]

    def release(self, *, remove: bool = False) -> None:
        """Bring the state back into memory, where it stays, and close the file; a temporary one is gone.

        Args:
            remove: delete the files.

        Raises:
            SpillError: the storage failed; the state stays where it is.
            TrainingError: in the middle of a step.
        """
        self._before_state_dict(self.optimizer)
        self._close(remove=remove)

    def close(self) -> None:
        """Close the file. Temporary state is gone; other state stays in the folder, of the last whole step."""
        if not self._closed:
            self._close()

    def _close(self, *, remove: bool = False) -> None:
        self._closed = True
        self._unhook()
        with suppress(NarrowboatError):
            self.file.close(remove=remove)

    def _fingerprint(self) -> str:
        rows: list[Any] = [f"{type(self.optimizer).__module__}.{type(self.optimizer).__qualname__}"]
        for group in self.optimizer.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            rows.append([[n, list(p.shape), str(p.dtype)] for n, p in zip(names, group["params"], strict=True)])
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _routed(stored: StoredOptimizer, own: Any) -> Any:
    """``optimizer.step`` while its state is on storage; a function, as schedulers wrap it by its ``__func__``."""

    @functools.wraps(own)
    def step(optimizer: Optimizer, closure: Any = None) -> Any:
        if stored._closed:
            return own(closure)
        if closure is not None:
            raise TrainingError(
                "an optimizer whose state is on storage takes no closure; compute the gradients, then step"
            )
        return stored.step()

    return step
