"""The wrappers round each module's ``forward``, and the guards on what a streamed module cannot do.

``forward`` is wrapped on the instance instead of registering hooks: with a hook anywhere inside,
``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` leave their fast path and the last bits change; a wrapper
sees calls to ``.forward()`` too; ``finally`` runs on KeyboardInterrupt, where PyTorch's always-called hooks do not.
Arguments go through untouched, so a dict that layers share stays one dict.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from narrowboat.errors import StreamedModelError
from narrowboat.profile.skeleton import streamed_modules
from narrowboat.profile.tiled_forward import Tile
from narrowboat.profile.use_trace import announces
from narrowboat.stream.engine import Engine

_MARK = "_narrowboat_engine"


Named = Callable[[Exception], Exception | None]


def wrap_modules(root: nn.Module, engine: Engine, named: Named = lambda error: None) -> None:
    """Wrap every module of ``root`` that has weights below it, and ``root`` itself.

    Args:
        named: what to raise instead of an error that a pass ended with; None for the error itself.
    """
    for number, (name, module) in enumerate(streamed_modules(root)):
        # A module without weights may be one object in many models (an activation kept in a table, say).
        if module is not root and not announces(module):
            continue
        module.__dict__[_MARK] = engine
        if not isinstance(module, Tile):  # nobody gets hold of one
            _guard(module, name)
        forward = module.forward
        module.__dict__["_narrowboat_forward"] = module.__dict__.get("forward")
        module.forward = _wrap(engine, number, forward, named)


def unwrap_modules(root: nn.Module) -> None:
    """Take the wrappers and guards off again."""
    for module in root.modules():
        if _MARK not in module.__dict__:
            continue
        del module.__dict__[_MARK]
        for name in ("__deepcopy__", "__reduce_ex__", "_apply"):
            module.__dict__.pop(name, None)
        if "_narrowboat_forward" in module.__dict__:
            before = module.__dict__.pop("_narrowboat_forward")
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before


def engine_of(module: nn.Module) -> Engine | None:
    """The engine that streams ``module``, if any."""
    return module.__dict__.get(_MARK)


def _wrap(engine: Engine, number: int, forward: Callable[..., Any], named: Named) -> Callable[..., Any]:
    lock, enter, leave = engine.lock, engine.enter, engine.leave

    @functools.wraps(forward)
    def streamed_forward(*args: Any, **kwargs: Any) -> Any:
        crew = engine.crew
        if crew is not None and crew.is_member():
            return crew.call(number, forward, args, kwargs)
        with lock:
            depth = engine.depth
            try:
                try:
                    enter(number, depth)
                    result = forward(*args, **kwargs)
                except BaseException:
                    leave(number, depth, failed=True)
                    raise
                leave(number, depth)
                return result
            except Exception as error:
                ours = named(error) if depth == 0 else None
                if ours is None:
                    raise
                raise ours from error
            except BaseException:
                # Ctrl-C can strike between any two instructions, the engine's own included.
                engine.torn = True
                engine.depth = depth
                raise

    return streamed_forward


def _guard(module: nn.Module, name: str) -> None:
    where = f"module {name!r}" if name else "this model"

    def refuse_copy(memo: Any = None) -> Any:
        raise StreamedModelError(
            f"{where} is streamed: a copy would need the bytes that the budget does not have; build a second model "
            "from the factory and stream it, or close the session first"
        )

    def refuse_pickle(protocol: Any) -> Any:
        raise StreamedModelError(
            f"{where} is streamed and cannot be pickled whole; save its weights with "
            "torch.save(model.state_dict(), ...) or copy the weights file"
        )

    def apply(fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for tensor in [*module.parameters(), *module.buffers()]:
            probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            moved = fn(probe)
            if moved.dtype != probe.dtype or moved.device != probe.device:
                before, after = (str(t.dtype).removeprefix("torch.") for t in (probe, moved))
                raise StreamedModelError(
                    f"{where} is streamed in {before} on {tensor.device} and cannot be moved to {after} on "
                    f"{moved.device}: "
                    "convert the weights file, or close the session first"
                )
            if moved.is_shared():
                raise StreamedModelError(f"{where} is streamed and cannot move to shared memory")
        return module

    module.__dict__["__deepcopy__"] = refuse_copy
    module.__dict__["__reduce_ex__"] = refuse_pickle
    module.__dict__["_apply"] = apply
