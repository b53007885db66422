"""Models streamed at the smallest budget, where their layers are in tiles, and compared with plain PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_leaves

import narrowboat as nb
from narrowboat.errors import BudgetError, NarrowboatError

MIB = 1 << 20
ROUNDING = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest element


CHILD = """
import json, sys, torch
import narrowboat as nb
from narrowboat.machine.memory import process_memory
from narrowboat.profile.warmup import warm_up
from torch import nn
torch.set_num_threads(1)
path, budget = sys.argv[1], int(sys.argv[2])
{setup}
with torch.device("meta"):
    factory()  # initialising on meta loads some eighty megabytes of PyTorch, which are the process's
warm_up()
model = nb.stream(factory, path, budget=budget, example=(x,))
with torch.inference_mode():
    for _ in range(3):
        answer = model(x)
stats = nb.session(model).stats()
print(json.dumps({{
    "answer": {answer}.tolist(),
    "over_baseline": process_memory().hwm - stats["baseline_bytes"],
    "tiled": stats["tiled_layers"],
}}))
"""


def in_a_process(path: Path, budget: int, setup: str, answer: str = "answer") -> Any:
    """What three passes in a process of their own give and take.

    Args:
        setup: lines that define ``factory`` and ``x``.
        answer: the part of ``answer`` that is told.
    """
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(setup=setup, answer=answer), str(path), str(budget)],
        capture_output=True,
        text=True,
        env={**os.environ, "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


class Kit:
    """Streams models at the smallest budget, and closes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: list[nn.Module] = []

    def at_rest(self, plain: nn.Module, *, packed: bool = True) -> Path:
        path = self.folder / f"{len(list(self.folder.iterdir()))}.safetensors"
        state = plain.state_dict()
        if packed:
            nb.pack(state, path)
        else:
            save_file({key: value.clone() for key, value in state.items()}, path)
        return path

    def least(self, model: Any, path: Path, example: Any) -> int:
        with pytest.raises(BudgetError) as refused:
            nb.stream(model, path, budget=1, example=example)
        return refused.value.minimum

    def stream(self, model: Any, path: Path, example: Any, more: int = 0) -> Any:
        made = nb.stream(model, path, budget=self.least(model, path, example) + more, example=example)
        self.opened.append(made)
        return made.eval()


@pytest.fixture(name="kit")
def tiles_kit(tmp_path: Path) -> Iterator[Kit]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Kit(tmp_path)
    yield made
    torch.set_num_threads(threads)
    for model in made.opened:
        with suppress(NarrowboatError):
            nb.session(model).close()


def check(kit: Kit, factory: Callable[[], nn.Module], *inputs: Any, packed: bool = True, traced: bool = True) -> Any:
    """Stream at the smallest budget and compare four passes with plain PyTorch; returns the model."""
    torch.manual_seed(0)
    plain = factory().eval()
    with torch.inference_mode():
        wanted = tree_leaves(plain(*inputs))
    model = kit.stream(factory, kit.at_rest(plain, packed=packed), inputs if traced else None)
    with torch.inference_mode():
        for _ in range(4):
            for got, want in zip(tree_leaves(model(*inputs)), wanted, strict=True):
                if want is None:
                    assert got is None
                    continue
                assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
                scale = want.abs().max().item() if want.numel() else 1.0
                assert not want.numel() or (got - want).abs().max().item() <= ROUNDING[want.dtype] * scale
    stats = nb.session(model).stats()
    assert stats["tiled_layers"]
    assert stats["window_bytes"] + stats["resident_bytes"] < stats["budget_bytes"]
    if traced:
        assert stats["off_trace_passes"] == stats["misses"] == stats["jumps"] == 0
    return model
