"""A robot whose tasks really take turns, in simulated time: what the live page is looked at with, and tested."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from narrowboat.errors import BadRequestError
from narrowboat.quantities import format_bytes, parse_bytes
from narrowboat.serve.interface import TaskFace
from narrowboat.serve.page.images import prepare
from narrowboat.tasks.tensors import RawTensor, TensorSpec
from serve_kit import MIB, FakeGateway, raw, values

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LABELS = ["tabby cat", "astronaut", "coffee mug"]
POOL = 96 * MIB


@dataclass(frozen=True)
class Part:
    """One task of the robot: times in microseconds, ``stays`` of its blocks are resident."""

    name: str
    model: str
    period: int
    deadline: int
    bound: int | None
    blocks: int
    nbytes: int
    load: int
    compute: int
    stays: int = 0

    def block(self, k: int) -> dict[str, int]:
        """As the plan has it; sizes differ, as layers do."""
        size = int(self.nbytes * (0.55 + 0.9 * ((k * 7919 + 3) % 11) / 10))
        if k < self.stays:
            return {"bytes": 0, "resident_bytes": size, "load_us": 0, "compute_us": self.compute}
        kept = size // 5 if k % 3 == 0 else 0
        return {"bytes": size - kept, "resident_bytes": kept, "load_us": self.load, "compute_us": self.compute}


PARTS = (
    Part("detector", "zoo:yolov3", 400_000, 400_000, 331_000, 14, 9 * MIB, 7_000, 9_200, 3),
    Part("floor", "zoo:fcn", 600_000, 600_000, 468_000, 9, 11 * MIB, 8_000, 12_500, 1),
    Part("recogniser", "zoo:resnet101", 250_000, 250_000, 187_000, 7, 6 * MIB, 5_000, 6_400, 2),
    Part("tracker", "zoo:efficientnet_lite2", 100_000, 80_000, 52_000, 3, 4 * MIB, 3_000, 3_000, 3),
    Part("writer", "text:gpt2?window=64", 900_000, 900_000, None, 8, 8 * MIB, 6_000, 9_000, 0),
)


def references(images: Mapping[str, bytes]) -> np.ndarray:
    """Known images as the recogniser sees them, by LABELS."""
    return np.stack([values(prepare(images[label], (1, 3, 64, 64), MEAN, STD))[0] for label in LABELS])


def recogniser(known: np.ndarray) -> Any:
    """A network that tells which of the known images it is given."""

    def network(inputs: Mapping[str, RawTensor]) -> list[RawTensor]:
        (image,) = inputs.values()
        return [raw("FP32", -6 * np.abs(known - values(image)).mean(axis=(1, 2, 3))[None])]

    return network


def face_of(part: Part) -> TaskFace:
    """As clients see it."""
    facts: dict[str, Any] = {}
    inputs, outputs = [TensorSpec("x", "FP32", (1, 3, 8, 8))], [TensorSpec("y", "FP32", (1, 3, 8, 8))]
    if part.name == "recogniser":
        inputs, outputs = [TensorSpec("image", "FP32", (1, 3, 64, 64))], [TensorSpec("scores", "FP32", (1, 3))]
        facts = {"image": {"mean": MEAN, "std": STD}, "labels": LABELS}
    elif part.name == "writer":
        facts = {"text": "causal", "tokenizer": "gpt2", "window": 64}
    bound, guaranteed = part.bound, part.bound is not None
    wants = part.name != "tracker"
    fields = (part.name, part.model, True, wants, guaranteed, tuple(inputs), tuple(outputs), bound)
    return TaskFace(*fields, part.deadline, part.period, 1, "", facts)


@dataclass
class Job:
    """One job under way; ``done`` blocks are computed, ``ready`` are loaded."""

    part: Part
    number: int
    release: int
    due: int
    start: int | None = None
    done: int = 0
    ready: int = 0
    preempted: int = 0


@dataclass
class Robot:
    """The tasks in simulated microseconds: at each block boundary the most urgent job goes on."""

    parts: Sequence[Part] = PARTS
    now: int = 0
    luck: random.Random = field(default_factory=lambda: random.Random(7))
    pending: list[Job] = field(default_factory=list)
    held: deque[tuple[str, int, int]] = field(default_factory=deque)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    segments: list[list[Any]] = field(default_factory=list)
    busy: dict[str, int] = field(default_factory=lambda: {"compute": 0, "load": 0})
    tally: dict[str, dict[str, int]] = field(default_factory=dict)
    last: Job | None = None
    peak: int = 0
    found: int = 0

    def __post_init__(self) -> None:
        self.next = {part.name: k * 17_000 for k, part in enumerate(self.parts)}
        self.numbers = {part.name: 0 for part in self.parts}

    def advance(self, until: int) -> None:
        """Up to a time, and to the end of what is under way then."""
        while self.now < until:
            self._release()
            if not self.pending:
                self.now = min(min(self.next.values()), until)
                continue
            job = min(self.pending, key=lambda job: (job.part.bound is None, job.due))
            if self.last is not None and self.last is not job and self.last in self.pending and self.last.start:
                self.last.preempted += 1
            self.last = job
            self._step(job)

    def _release(self) -> None:
        for part in self.parts:
            while self.next[part.name] <= self.now:
                release, number = self.next[part.name], self.numbers[part.name]
                self.numbers[part.name] += 1
                self.next[part.name] += part.period
                if part.bound is None and self.luck.random() < 0.06:
                    cause = "beyond its contract: the next may come in 0.4 s"
                    self._end(Job(part, number, release, release + part.deadline), "skipped", cause, None)
                else:
                    self.pending.append(Job(part, number, release, release + part.deadline))

    def _step(self, job: Job) -> None:
        begin, ends = self.now + 60, [self.now + 60]
        if job.start is None:
            job.start = begin
        if job.done < job.ready:
            ends.append(begin + self._took(job.part.compute))
            self._did("compute", "compute", job, job.done, begin, ends[-1], 0)
            job.done += 1
        if job.ready < job.part.blocks:
            block = job.part.block(job.ready)
            if block["bytes"] and not self._is_in(job.part.name, job.ready):
                ends.append(begin + self._took(job.part.load))
                self._did("load", "load", job, job.ready, begin, ends[-1], block["bytes"])
                self._bring(job.part.name, job.ready, block["bytes"])
            elif block["bytes"]:
                self.found += 1
            job.ready += 1
        self.now = max(ends)
        if job.done == job.part.blocks:
            self.pending.remove(job)
            late = self.now > job.due
            self._end(job, "late" if late else "done", "ended after its deadline" if late else "", self.now)

    def _took(self, most: int) -> int:
        return int(most * self.luck.triangular(0.62, 1.0, 0.74))

    def _did(self, engine: str, what: str, job: Job, block: int, begin: int, end: int, nbytes: int) -> None:
        self.segments.append([engine, what, job.part.name, job.number, block, begin, end, nbytes])
        self.busy[engine] += end - begin

    def _is_in(self, name: str, block: int) -> bool:
        return any(one[:2] == (name, block) for one in self.held)

    def _bring(self, name: str, block: int, nbytes: int) -> None:
        while sum(one[2] for one in self.held) + nbytes > POOL:
            self.held.popleft()
        self.held.append((name, block, nbytes))

    def _end(self, job: Job, outcome: str, cause: str, finish: int | None) -> None:
        tally = self.tally.setdefault(job.part.name, {"done": 0, "missed": 0})
        tally["done" if outcome == "done" else "missed"] += 1
        told = {"task": job.part.name, "number": job.number, "release": job.release, "due": job.due}
        more = {"start": job.start, "finish": finish, "preemptions": job.preempted}
        self.jobs.append({**told, **more, "outcome": outcome, "cause": cause})

    def tick(self, budget: int, when: float) -> dict[str, Any]:
        """The picture of now, and what happened since the last."""
        swap = sum(one[2] for one in self.held)
        resident = sum(part.block(k)["resident_bytes"] for part in self.parts for k in range(part.blocks))
        other = 21 * MIB + self.luck.randrange(6 * MIB)
        self.peak = max(self.peak, resident + swap + other)
        jobs, self.jobs, segments, self.segments = self.jobs, [], self.segments, []
        at = self.last if self.last in self.pending else None
        name = at.part.name if at else ""
        doing = {"compute": f"{name} block {at.done}", "load": f"{name} block {at.ready}"} if at else {}
        return {
            "event": "tick",
            "now_us": self.now,
            "time": when,
            "held_bytes": resident + swap + other,
            "budget_bytes": budget,
            "peak_bytes": self.peak,
            "pools": {"resident": resident, "swap": swap, "swap_limit": POOL, "other": other},
            "busy": {engine: spent / max(self.now, 1) for engine, spent in self.busy.items()},
            "busy_us": dict(self.busy),
            "doing": doing,
            "pending": [f"{job.part.name} #{job.number}" for job in self.pending],
            "in": {part.name: [one[1] for one in self.held if one[0] == part.name] for part in self.parts},
            "coming": {name: at.ready} if at and at.ready < at.part.blocks else {},
            "tasks": {name: dict(tally) for name, tally in self.tally.items()},
            "jobs": jobs,
            "jobs_lost": 0,
            "segments": segments,
            "segments_lost": 0,
            "counters": {"overruns": 0, "prefetch_hit": 0, "prefetch_aborted": 0, "blocks_found": self.found},
            "late_wake_us": 80,
        }


class RobotGateway(FakeGateway):
    """The common fake with the robot's tasks; bounds get longer as the budget falls."""

    def __init__(self, known: np.ndarray, budget: int = 256 * MIB) -> None:
        spare = TaskFace(
            "segmenter", "zoo:deeplab", False, True, True, (), (), None, 800_000, 800_000, 1, "not loaded"
        )
        faces = [face_of(part) for part in PARTS] + [spare]
        super().__init__(faces, {"recogniser": recogniser(known)}, budget=budget)
        self.robot = Robot()
        self.broken: list[dict[str, Any]] = []

    def plan(self) -> dict[str, Any]:
        """Of the tasks that are ready."""
        return self._plan_for(self.budget, [])

    def _plan_for(self, budget: int, extra: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        parts = {part.name: part for part in PARTS}
        tasks = []
        for face in self.faces():
            if not face.ready:
                continue
            part = parts.get(face.name, Part(face.name, face.model, 800_000, 800_000, 700_000, 6, 5 * MIB, 4000, 5000))
            tasks.append(self._task(part, 1 + max(0.0, 0.4 * (256 * MIB - budget) / (256 * MIB))))
        for new in extra:
            period = int(float(str(new.get("period", "1000ms")).removesuffix("ms")) * 1000)
            bound = None if new.get("guarantee") == "best-effort" else int(period * 0.7)
            model = str(new.get("model", ""))
            tasks.append(self._task(Part(str(new["name"]), model, period, period, bound, 2, MIB, 50, 50), 1.0))
        pinned = sum(task["pinned_bytes"] for task in tasks)
        needed = (
            pinned + 72 * MIB + sum(int(block.get("bytes", 0)) for new in extra for block in new.get("blocks", []))
        )
        admitted = needed <= budget
        reasons = [
            f"memory: {format_bytes(needed)} are needed at the worst instant, of {format_bytes(budget)}: "
            "detector runs while recogniser and floor keep the block that each has loaded"
        ]
        return {
            "budget_bytes": budget,
            "needed_bytes": needed,
            "pinned_bytes": pinned,
            "pool_bytes": max(budget - pinned - 24 * MIB, 0),
            "always_bytes": pinned,
            "policy": "edf",
            "preemption": "lp-keep",
            "supply": {"share": 0.95, "delay_us": 50_000},
            "admitted": admitted,
            "overrun_tolerance_us": 41_000,
            "utilisation": sum(task["utilisation"] for task in tasks),
            "reasons": [] if admitted else reasons,
            "suggestions": [] if admitted else [f"budget: {format_bytes(needed)} ({needed} bytes) would hold them"],
            "tasks": [{**task, "admitted": admitted} for task in tasks],
        }

    @staticmethod
    def _task(part: Part, slower: float) -> dict[str, Any]:
        blocks = [part.block(k) for k in range(part.blocks)]
        cost = sum(max(block["load_us"], block["compute_us"]) for block in blocks)
        return {
            "name": part.name,
            "model": part.model,
            "guarantee": "best-effort" if part.bound is None else "guaranteed",
            "takes_requests": part.name != "tracker",
            "response_bound_us": None if part.bound is None else int(part.bound * slower),
            "deadline_us": part.deadline,
            "period_us": part.period,
            "burst": 1,
            "cost_us": cost,
            "longest_segment_us": part.compute,
            "utilisation": cost / part.period,
            "pinned_bytes": sum(block["resident_bytes"] for block in blocks),
            "running_bytes": 2 * part.nbytes,
            "blocks": blocks,
        }

    async def what_if(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The plan that would be."""
        if self._refusals:
            raise self._refusals.popleft()
        budget = self.budget if question.get("budget") is None else parse_bytes(question["budget"])
        for fields in question.get("add") or []:
            if fields.get("model", "zoo:").startswith("nowhere"):
                raise BadRequestError(f"model {fields['model']!r} is not known here")
        plan = self._plan_for(budget, question.get("add") or [])
        change = {"pause_us": 38_000, "allowed_us": 412_000} if plan["admitted"] else None
        return {**{key: plan[key] for key in ("admitted", "reasons", "suggestions")}, "plan": plan, "change": change}
