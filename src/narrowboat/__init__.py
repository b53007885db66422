"""Run, schedule and train PyTorch models inside a fixed number of bytes.

    import narrowboat as nb

    model = nb.stream(factory, "model.safetensors", budget="300MiB", example=(x,))
    y = model(x)                    # the same bits as plain PyTorch
    nb.session(model).stats()       # what it cost

    step = nb.train_step(model, loss_fn, optimizer, budget="1.5GiB")
    loss = step(inputs, targets)    # the gradients of the plain step

``import narrowboat`` imports neither torch nor anything else that is slow; each name is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from narrowboat import errors
from narrowboat.errors import BudgetError, NarrowboatError

if TYPE_CHECKING:
    from narrowboat.checkpoint import pack
    from narrowboat.stream.api import session, stream
    from narrowboat.stream.pretrained import stream_pretrained
    from narrowboat.stream.session import Session
    from narrowboat.tasks.task_set import TaskSet
    from narrowboat.train.recompute import checkpoint_plan
    from narrowboat.train.step import TrainStep, train_step

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "NarrowboatError",
    "Session",
    "TaskSet",
    "TrainStep",
    "checkpoint_plan",
    "errors",
    "pack",
    "session",
    "stream",
    "stream_pretrained",
    "train_step",
]

_LAZY = {
    "Session": "narrowboat.stream.session:Session",
    "TaskSet": "narrowboat.tasks.task_set:TaskSet",
    "TrainStep": "narrowboat.train.step:TrainStep",
    "checkpoint_plan": "narrowboat.train.recompute:checkpoint_plan",
    "pack": "narrowboat.checkpoint:pack",
    "session": "narrowboat.stream.api:session",
    # The package itself, which can be called: see `_callable_module`.
    "stream": "narrowboat.stream:",
    "stream_pretrained": "narrowboat.stream.pretrained:stream_pretrained",
    "train_step": "narrowboat.train.step:train_step",
}


def __getattr__(name: str) -> Any:
    target = _LAZY.get(name)
    if target is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, _, attribute = target.partition(":")
    module = importlib.import_module(module_name)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
