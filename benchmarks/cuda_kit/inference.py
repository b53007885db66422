"""The inference part: which child runs when, for one model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cuda_kit.batches import telling
from cuda_kit.bounds import medians
from cuda_kit.campaign import Campaign, PartFailedError, Record
from cuda_kit.children import Outcome
from cuda_kit.effort import DIVISORS, Inference
from cuda_kit.models import specs, tensor_shapes
from cuda_kit.subjects import PEERS

_CALLS = "cuda_kit.inference_child"
_SMALL_HOST = 16  # the weights' bytes over those of the host when they come from storage
_LEAST_HOST = 16 << 20
_FROM_STORAGE = {"settle": 3, "least": 2, "passes": 5}  # passes take seconds
_UNKNOWN = (1, 4, 16)  # batch sizes where nobody knows how long resident takes
_WRITING = 300.0  # seconds at most


class InferencePart:
    """One model.

    Args:
        campaign: what all parts share.
        model: its name.
        effort: how much.
    """

    def __init__(self, campaign: Campaign, model: str, effort: Inference) -> None:
        self.campaign, self.model, self.effort = campaign, model, effort
        self.outputs = campaign.work / "outputs"
        shapes = tensor_shapes(specs(small=campaign.small)[model])
        self.weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in shapes.values())

    def run(self) -> None:
        """Everything; what fails is noted, and the rest goes on.

        Raises:
            PartFailedError: there is no weights file, or no bandwidth to compare with.
        """
        effort, into = self.effort, self.campaign.rate("in")
        self.outputs.mkdir(parents=True, exist_ok=True)
        copying = [self.weight_bytes * (1 - 1 / divisor) / into for divisor in DIVISORS]
        try:
            for number in range(effort.rounds):
                self._resident(f"r{number}", max(copying))
                residents = self._residents()
                few = telling(residents, copying) or list(_UNKNOWN)
                sizes = sorted(residents) if effort.all_batches and residents else few
                turns = self._turns(number, sizes, few)
                for turn in turns[number % len(turns) :] + turns[: number % len(turns)]:
                    turn()
            self._resident("last", max(copying))
            if effort.storage:
                self._from_storage()
            if self.model == "vit":
                self._unified()
        finally:
            if self._path(self.campaign.fast) != self._path(self.campaign.work):
                self._path(self.campaign.fast).unlink(missing_ok=True)

    def _turns(self, number: int, sizes: list[int], few: list[int]) -> list[Callable[[], Any]]:
        turns: list[Callable[[], Any]] = [
            lambda d=divisor: self._ours("host", d, sizes, number, None) for divisor in DIVISORS
        ]
        if number == 0:
            for name in self.effort.peers:
                for divisor in DIVISORS if PEERS[name].budgets else (None,):
                    turns.append(lambda n=name, d=divisor: self._peer(n, d, few))
        return turns

    # -- subjects ----------------------------------------------------------------------------------------------

    def _resident(self, name: str, copy_seconds: float) -> None:
        known = self._residents()

        def arguments() -> dict[str, Any]:
            order = self._order(self._file(self.campaign.fast))
            most, batches = self.effort.most, sorted(known) or None
            return {"order": order, "copy_seconds": copy_seconds, "most": most, "batches": batches}

        self._measure(f"{self.model}/resident/{name}", "run_resident", arguments, "resident", None)

    def _ours(self, kind: str, divisor: float, batches: list[int], number: int, host: int | None) -> None:
        def arguments() -> dict[str, Any]:
            folder = self.campaign.fast if kind == "host" else self.campaign.work
            order = self._order(self._file(folder))
            residents = {str(batch): seconds for batch, seconds in self._residents().items()}
            if kind == "storage":
                residents, order["passes"] = {}, {**order["passes"], **_FROM_STORAGE}
            told = {"order": order, "divisor": divisor, "batches": batches, "residents": residents, "host": host}
            return told

        key = f"{self.model}/narrowboat-{kind}@{divisor:g}/r{number}"
        self._measure(key, "run_narrowboat", arguments, "narrowboat", divisor, kind)

    def _peer(self, name: str, divisor: float | None, batches: list[int]) -> None:
        def arguments() -> dict[str, Any]:
            room = int(self.weight_bytes / divisor) if divisor else 0
            beside = max((b["stats"]["fixed_bytes"] for b in self._our_batches(divisor)), default=0)
            told = {"order": self._order(self._file(self.campaign.fast)), "subject": name, "batches": batches}
            return told | {"weights_budget": room, "beside": beside}

        key = f"{self.model}/{name}" + (f"@{divisor:g}" if divisor else "")
        self._measure(key, "run_peer", arguments, name, divisor, "peer")

    def _from_storage(self) -> None:
        """With so little host memory that most weights come from storage in every pass."""
        host = max(self.weight_bytes // _SMALL_HOST, _LEAST_HOST)
        self._measure_storage()
        self._ours("storage", DIVISORS[-1], [1], 0, host)
        if self._path(self.campaign.work) != self._path(self.campaign.fast):
            self._path(self.campaign.work).unlink(missing_ok=True)

    def _measure_storage(self) -> None:
        self.campaign.measure(
            f"{self.model}/storage-bandwidth",
            "cuda_kit.bandwidth:storage",
            lambda: {"path": self._file(self.campaign.work)},
            lambda outcome: outcome.event("storage") or {},
            timeout=120,
        )

    def _unified(self) -> None:
        def arguments() -> dict[str, Any]:
            return {"order": self._order(self._file(self.campaign.fast)), "batches": [1]}

        self._measure(f"{self.model}/narrowboat-unified", "run_unified", arguments, "narrowboat", None, "unified")

    # -- what they share ---------------------------------------------------------------------------------------

    def _measure(
        self,
        key: str,
        call: str,
        arguments: Callable[[], dict[str, Any]],
        subject: str,
        divisor: float | None,
        kind: str = "resident",
    ) -> None:
        about = {"part": self.model, "subject": subject, "kind": kind, "divisor": divisor}
        about |= {"weight_bytes": self.weight_bytes, "batches": []}
        self.campaign.measure(key, f"{_CALLS}:{call}", arguments, _told, timeout=self.effort.timeout, about=about)

    def _order(self, path: str) -> dict[str, Any]:
        effort = self.effort
        passes = {"settle": effort.settle, "least": effort.least, "passes": effort.passes, "seconds": effort.seconds}
        return {
            "model": self.model,
            "small": self.campaign.small,
            "path": path,
            "device": self.campaign.device,
            "passes": passes,
            "outputs": str(self.outputs),
            "weight_bytes": self.weight_bytes,
        }

    def _residents(self) -> dict[int, float]:
        """Resident's median seconds by batch size."""
        return medians(self._records("resident"))

    def _our_batches(self, divisor: float | None) -> list[dict[str, Any]]:
        ours = [r for r in self._records("narrowboat") if r["divisor"] == divisor and r["kind"] == "host"]
        return [b for r in ours for b in r["batches"] if b["status"] == "ok"]

    def _records(self, subject: str) -> list[Record]:
        records = self.campaign.results.records.values()
        return [r for r in records if r.get("part") == self.model and r.get("subject") == subject]

    # -- weights -----------------------------------------------------------------------------------------------

    def _path(self, folder: Path) -> Path:
        size = "small" if self.campaign.small else "full"
        return folder / f"narrowboat-bench-{self.model}-{size}.safetensors"

    def _file(self, folder: Path) -> str:
        """The weights file in a folder, made if it is not there: the same bytes everywhere.

        Raises:
            PartFailedError: it cannot be made.
        """
        path, other = self._path(folder), self._path(self.campaign.fast)
        if not path.exists() and other.exists():
            part = path.with_suffix(".part")
            shutil.copyfile(other, part)
            with part.open("rb") as copied:  # nothing is left to be written while it is read
                os.fsync(copied.fileno())
            part.replace(path)
        if not path.exists():
            told = {"model": self.model, "small": self.campaign.small, "path": str(path)}
            told["device"] = self.campaign.device
            outcome = self.campaign.children.run(f"{self.model}/file", f"{_CALLS}:write", told, timeout=_WRITING)
            self.campaign.say(f"{self.model}: weights written in {outcome.seconds:.1f} s {outcome.detail}")
            if outcome.event("written") is None:
                raise PartFailedError(f"the weights of {self.model} cannot be written: {outcome.detail}")
        return str(path)


def _told(outcome: Outcome) -> Record:
    """Batches with the device's memory as seen from outside while each was measured."""
    context = outcome.event("context")
    begun: float | None = None
    batches: list[dict[str, Any]] = []
    for event in outcome.events:
        if event["event"] == "begin":
            begun = event["at"]
        if event["event"] == "batch":
            batch = {key: value for key, value in event.items() if key not in ("event", "at")}
            seen = outcome.peak(begun, event["at"])
            batch["peak_bytes"] = batch["held_bytes"] if seen is None else seen  # where there is no NVML: at its end
            batches.append(batch)
    return {
        "batches": batches,
        "context_bytes": context["held"] if context else None,
        "peak_bytes": outcome.peak(),
        "used_before_bytes": outcome.before,
    }
