"""Steps of two gloo processes, run as ``python ranks_kit.py RANK FILE``; what they found goes to FILE as JSON."""

from __future__ import annotations

import copy
import datetime
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import narrowboat as nb
from narrowboat.errors import NarrowboatError

WORLD = 2
CASES: dict[str, Callable[[int], dict[str, Any]]] = {}


def run_ranks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run every case on two ranks; for each case what each rank found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"rank{rank}.json" for rank in range(WORLD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(files[rank])],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(WORLD)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for child in children:
            _, told = child.communicate(timeout=250)
            assert child.returncode == 0, told
    finally:
        for child in children:
            child.kill()
    found = [json.loads(file.read_text()) for file in files]
    return {name: [each[name] for each in found] for name in CASES}


def case(function: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    CASES[function.__name__] = function
    return function


class Tokens(nn.Module):
    """A small language model without anything random."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        blocks = [[nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24), nn.LayerNorm(24)] for _ in range(depth)]
        self.body = nn.Sequential(*(layer for block in blocks for layer in block))
        self.head = nn.Linear(24, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        logits: Tensor = self.head(x + self.body(x))
        return logits


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def entropy_pair(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()


def entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return entropy_pair(logits, targets)[0]


def batch(length: int = 12) -> tuple[Tensor, Tensor]:
    """Eight rows of tokens; the last ones have few targets."""
    torch.manual_seed(1)
    ids = torch.randint(0, 11, (8, length))
    targets = torch.randint(0, 11, (8, length))
    targets[5:, 3:] = -100
    return ids, targets


class Pair:
    """A model that is replicated, its step, and its twin that sees the whole batch alone."""

    def __init__(
        self, loss: Callable[..., Any] = entropy, model: nn.Module | None = None, lr: float = 0.5, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = (model or Tokens()).double()
        self.twin = copy.deepcopy(self.model)
        self.loss = loss
        self.reduced: list[int] = []
        replicas = DistributedDataParallel(self.model, bucket_cap_mb=0.005)
        replicas.register_comm_hook(None, lambda state, bucket: self._reduce(bucket))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.twin_optimizer = torch.optim.SGD(self.twin.parameters(), lr=lr, momentum=0.9)
        options = {"budget": "1GiB", "adapt": False, "enforce": False, **options}
        self.step = nb.train_step(replicas, loss, optimizer, **options)

    def _reduce(self, bucket: dist.GradBucket) -> Any:
        self.reduced.append(bucket.index())
        return allreduce_hook(dist.group.WORLD, bucket)

    def alone(self, ids: Tensor, targets: Tensor) -> float:
        """One plain step of the twin over the whole batch."""
        made = self.loss(self.twin(ids), targets)
        loss = made[0] / made[1] if isinstance(made, tuple) else made
        loss.backward()
        self.twin_optimizer.step()
        self.twin_optimizer.zero_grad()
        return float(loss)

    def apart(self) -> float:
        """The largest relative difference between the model's weights and the twin's."""
        pairs = zip(self.model.parameters(), self.twin.parameters(), strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    def compare(self, rank: int, cut: int, steps: int = 3, length: int = 12) -> dict[str, Any]:
        """Steps of both; rank 0 has the rows up to ``cut``."""
        ids, targets = batch(length)
        mine = slice(0, cut) if rank == 0 else slice(cut, None)
        losses = []
        for _ in range(steps):
            losses.append((float(self.step(ids[mine], targets[mine])), self.alone(ids, targets)))
        return {
            "apart": self.apart(),
            "losses": losses,
            "reduced": self.reduced,
            "parts": self.step.plan.parts,
            "repeated": self.step.report().as_dict()["repeated"],
        }


@case
def equal_parts(rank: int) -> dict[str, Any]:
    return Pair().compare(rank, 4)


@case
def several_micro_batches(rank: int) -> dict[str, Any]:
    return Pair(micro_batches=2).compare(rank, 4)


@case
def unequal_counts_and_plans(rank: int) -> dict[str, Any]:
    return Pair(micro_batches=(1, 3)[rank]).compare(rank, 5)


@case
def sum_and_count(rank: int) -> dict[str, Any]:
    return Pair(entropy_pair, micro_batches=(2, 1)[rank]).compare(rank, 5)


@case
def sums(rank: int) -> dict[str, Any]:
    return Pair(entropy_sum, micro_batches=(2, 1)[rank], lr=0.001).compare(rank, 5)


def _refusal(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except NarrowboatError as error:
        return {"kind": type(error).__name__, "message": str(error), "minimum": getattr(error, "minimum", 0)}
    return {"kind": ""}


@case
def one_budget_too_small(rank: int) -> dict[str, Any]:
    pair = Pair(budget=("1GiB", "4KiB")[rank])
    ids, targets = batch()
    mine = slice(0, 4) if rank == 0 else slice(4, None)
    refused = _refusal(lambda: pair.step(ids[mine], targets[mine]))
    pair.step.budget = "1GiB"
    return {**refused, **pair.compare(rank, 4)}


class Spoiled(Tokens):
    """Gives NaN, or finds no memory, in the next pass on rank 1 once it is armed."""

    def __init__(self, what: str, depth: int = 1) -> None:
        super().__init__(depth)
        self.what = what
        self.armed: list[bool] = []  # a step that is given up puts attributes back, not what they hold

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        if self.armed and dist.get_rank() == 1:
            self.armed.clear()
            if self.what == "memory":
                raise MemoryError("as if")
            return logits * float("nan")
        return logits


@case
def one_loss_not_finite(rank: int) -> dict[str, Any]:
    model = Spoiled("nan")
    pair = Pair(model=model, micro_batches=2)
    ids, targets = batch()
    mine = slice(0, 4) if rank == 0 else slice(4, None)
    pair.step.prepare(ids[mine], targets[mine])
    model.armed.append(True)
    refused = _refusal(lambda: pair.step(ids[mine], targets[mine]))
    model.armed.clear()
    return {**refused, **pair.compare(rank, 4)}


@case
def one_without_memory(rank: int) -> dict[str, Any]:
    model = Spoiled("memory", depth=8)
    pair = Pair(model=model, micro_batches=2)
    ids, targets = batch(length=384)
    mine = slice(0, 4) if rank == 0 else slice(4, None)
    pair.step.prepare(ids[mine], targets[mine])
    model.armed.append(True)
    return pair.compare(rank, 4, length=384)


@case
def batch_norm_as_replicas_have_it(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # other buffers on each rank; the first rank's count
    images, targets = torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)]
    model = nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    with torch.no_grad():
        model[1].running_mean += rank
    twin = copy.deepcopy(model)
    wrapped, plain = DistributedDataParallel(model), DistributedDataParallel(twin)
    with torch.no_grad():
        model[1].running_mean += rank
        twin[1].running_mean += rank
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    step = nb.train_step(wrapped, F.cross_entropy, optimizer, budget="1GiB", adapt=False, enforce=False)
    step.budget = step.prepare(images, targets).min_budget
    for _ in range(3):
        step(images, targets)
        F.cross_entropy(plain(images), targets).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    same = [torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)]
    return {
        "same": all(same),
        "replays": step.report().steps[-1].replays,
        "departed": step.report().steps[-1].departed,
    }


def main(rank: int, file: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported need not be searched for garbage each time that a step is planned
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    found = {name: function(rank) for name, function in CASES.items()}
    dist.destroy_process_group()
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
