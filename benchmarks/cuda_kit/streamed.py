"""narrowboat as a subject: a session whose device budget is a share of the weights and what a pass takes beside."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import narrowboat as nb
from cuda_kit.models import Spec
from cuda_kit.place import Place
from cuda_kit.runner import Model
from narrowboat.arena.device.interface import Device
from narrowboat.errors import BudgetError

_SOME_HOST = 64 << 20  # bytes, enough to ask for a plan
_MORE_HOST = 1.02  # times the weights, and
_HOST_BESIDE = 256 << 20  # bytes for buffers on the way
_KEPT = (
    "min_budget_bytes",
    "budget_bytes",
    "fixed_bytes",
    "resident_bytes",
    "window_bytes",
    "peak_bytes",
    "host_budget_bytes",
    "pinned_bytes",
    "host_cache_bytes",
    "copy_bytes_per_s",
    "bandwidth_bytes_per_s",
    "predicted_latency_ms",
    "bound_ms",
    "direct_io",
    "misses",
    "off_trace_passes",
)


class Streamed(Model):
    """A session's model.

    Args:
        module: as streamed.
        asked: what it was asked for, told with the rest.
    """

    def __init__(self, module: nn.Module, asked: dict[str, Any]) -> None:
        super().__init__(module)
        self._session, self._asked, self._before = nb.session(module), asked, 0

    def begin(self) -> None:
        """See ``Model``."""
        self._before = self._session.stats()["device_copied_bytes"]

    def told(self, passes: int) -> dict[str, Any]:
        """See ``Model``: bytes are per pass."""
        stats = self._session.stats()
        return self._asked | {
            "copied_bytes": round((stats["device_copied_bytes"] - self._before) / passes),
            "read_bytes": round(statistics.fmean(stats["bytes_read"][-passes:])),
            "stall_ms": statistics.median(stats["stall_ms"][-passes:]),
            "stats": {key: stats[key] for key in _KEPT if key in stats},
            "plan": str(self._session.plan),
        }


@dataclass(slots=True)
class Ask:
    """One session to be had.

    Attributes:
        spec, path: the model and its weights.
        place: where.
        accelerator: narrowboat's device.
        batch: of the passes to come.
        weight_bytes: of the model.
        divisor: the weights' bytes over those of the device that are for them.
        host: bytes of pinned host memory; None for as many as all weights take.
        opened: what has to be closed.
    """

    spec: Spec
    path: Path
    place: Place
    accelerator: Device
    batch: int
    weight_bytes: int
    divisor: float
    host: int | None
    opened: list[nn.Module] = field(default_factory=list)

    def load(self) -> Model:
        """Ask for the smallest budget, then for what the pass takes beside weights, then for the model."""
        least = _least(self._stream)
        fixed = nb.session(self._stream(least, _SOME_HOST)).plan.fixed_bytes
        self.close()
        wanted = int(self.weight_bytes / self.divisor) + fixed
        given = max(wanted, least)
        host = int(self.weight_bytes * _MORE_HOST) + _HOST_BESIDE if self.host is None else self.host
        try:
            module = self._stream(given, host)
        except BudgetError as error:  # the buffers between storage and device need more of the host
            if self.host is None or error.minimum is None:
                raise
            module = self._stream(given, error.minimum)
        asked = {
            "weights_budget_bytes": int(self.weight_bytes / self.divisor),
            "given_bytes": given,
            "least_bytes": least,
            "fixed_at_first_bytes": fixed,
            "smallest": given > wanted,
        }
        return Streamed(module, asked)

    def _stream(self, nbytes: int, for_host: int) -> nn.Module:
        budget = {self.place.budget_name: nbytes, "cpu": for_host}
        example = self.spec.inputs(self.batch)
        made = nb.stream(self.spec.build, self.path, budget=budget, device=self.accelerator, example=example)
        self.opened.append(made)
        return made.eval()

    def close(self) -> None:
        """Close what was opened, and give the device's memory back."""
        while self.opened:
            nb.session(self.opened.pop()).close()
        gc.collect()
        self.place.empty()


def _least(stream: Callable[[int, int], nn.Module]) -> int:
    """The smallest budget of the device, as the refusal of one byte tells it."""
    try:
        nb.session(stream(1, _SOME_HOST)).close()
    except BudgetError as error:
        assert error.minimum is not None
        return error.minimum
    raise RuntimeError("a budget of one byte was enough")
