"""Times one subject at several batch sizes in a child, and compares its answers with resident's."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cuda_kit.children import Emit, one_line, state_of
from cuda_kit.models import Inputs, Spec, to_place
from cuda_kit.place import Place


@dataclass(frozen=True, slots=True)
class Passes:
    """How many; see ``effort.Inference``."""

    settle: int
    least: int
    passes: int
    seconds: float


class Model:
    """What is called, and what it has to tell.

    Args:
        call: takes a pass's keyword arguments.
        settle: passes it needs before it is what it will be.
        context: of a pass.
    """

    def __init__(
        self, call: Callable[..., Any], settle: int = 0, context: Callable[[], Any] = torch.inference_mode
    ) -> None:
        self.call, self.settle, self.context = call, settle, context

    def begin(self) -> None:
        """The passes that count begin."""

    def told(self, passes: int) -> dict[str, Any]:
        """What is known after so many of them."""
        return {}


class Runner:
    """Times one subject and tells of it.

    Args:
        emit: takes ``begin`` and ``batch`` for every batch size.
        spec: of the model.
        place: where.
        passes: how many.
        outputs: folder of resident's answers.
        reference: this is resident, which writes them.
    """

    def __init__(
        self, emit: Emit, spec: Spec, place: Place, passes: Passes, outputs: str, *, reference: bool = False
    ) -> None:
        self._emit, self._spec, self.place, self._passes = emit, spec, place, passes
        self._outputs, self._reference = Path(outputs), reference

    def batch(self, batch: int, load: Callable[[], Model]) -> float | None:
        """Measure one batch size; the median seconds, or None if it failed."""
        self.place.reset_peaks()
        self._emit("begin", batch=batch)
        told: dict[str, Any] = {"batch": batch, "status": "ok", "detail": ""}
        seconds = None
        try:
            inputs = to_place(self._spec.inputs(batch), self.place.torch_device)
            told["outside_bytes"] = self.place.reserved()  # the inputs are their caller's, whoever runs the model
            told |= self._measure(load(), inputs, batch)
            seconds = told["median_s"]
        except Exception as error:
            told |= {"status": state_of(error), "detail": one_line(error), "minimum": getattr(error, "minimum", None)}
        peaks = self.place.peaks()
        told["held_bytes"] = self.place.held()
        told["allocated_bytes"], told["reserved_bytes"] = peaks if peaks is not None else (None, None)
        self._emit("batch", **told)
        return seconds

    def _measure(self, model: Model, inputs: Inputs, batch: int) -> dict[str, Any]:
        outputs: list[Any] = [None]

        def call() -> None:
            outputs[0] = None  # an answer of the benchmark's own is not the subject's
            outputs[0] = model.call(**inputs)

        with model.context():
            first, _ = self.place.timed(call)
            digests = {_digest(outputs[0])}
            for _ in range(max(self._passes.settle, model.settle) - 1):
                self.place.timed(call)
            seconds: list[float] = []
            events: list[float] = []
            model.begin()
            while len(seconds) < self._passes.least or (
                len(seconds) < self._passes.passes and sum(seconds) < self._passes.seconds
            ):
                wall, event = self.place.timed(call)
                seconds.append(wall)
                events += [event] if event is not None else []
            told = model.told(len(seconds))
            digests.add(_digest(outputs[0]))
        return told | {
            "first_s": first,
            "seconds": seconds,
            "median_s": statistics.median(seconds),
            "event_median_s": statistics.median(events) if events else None,
            "digests": sorted(digests),
            "difference": self._compare(batch, outputs[0]),
        }

    def _compare(self, batch: int, output: Any) -> float | None:
        """Largest difference from resident's answer, relative to its largest value; None for resident itself."""
        path = self._outputs / f"{self._spec.name}.b{batch}.pt"
        got = _logits(output).float().cpu()
        if self._reference:
            torch.save(got, path)
            return None
        if not path.exists():
            return None
        want = torch.load(path)
        return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def _logits(output: Any) -> torch.Tensor:
    found = output.logits
    assert isinstance(found, torch.Tensor)
    return found


def _digest(output: Any) -> str:
    """Of the answer's bytes."""
    raw = _logits(output).detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()[:16]
