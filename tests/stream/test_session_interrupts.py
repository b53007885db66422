"""Ctrl-C at any moment leaves a session that answers rightly or says that it is closed, and never hangs."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import pytest
import torch

import narrowboat as nb
from interrupt_kit import Interrupter
from narrowboat.errors import SessionClosedError


def interrupted_pass(interrupter: Interrupter, model: Any, x: torch.Tensor) -> str:
    """One pass; what came of it."""
    with torch.inference_mode():
        try:
            return interrupter.run(lambda: model(x))
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def answers(model: Any, deep: Any) -> str:
    """What three passes from another thread give: ``right``, ``closed``, ``hung``, or what went wrong."""
    result = ["hung"]

    def call() -> None:
        try:
            result[0] = "right" if deep.right(model, 3) else "WRONG"
        except SessionClosedError:
            result[0] = "closed"
        except BaseException as error:
            result[0] = f"{type(error).__name__}: {str(error)[:100]}"

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(10)
    return result[0]


@pytest.mark.parametrize("extra", [0, 1 << 20], ids=["smallest", "partly resident"])
def test_an_interrupt_at_any_moment_leaves_it_right_or_closed(deep: Any, extra: int) -> None:
    model = deep.stream(budget=deep.minimum + extra)
    deep.right(model, 3)
    counter = Interrupter(-1)
    interrupted_pass(counter, model, deep.x)
    broken = []
    for at in range(1, counter.moments, max(counter.moments // 60, 1)):
        interrupter = Interrupter(at)
        if interrupted_pass(interrupter, model, deep.x) == "done":
            continue  # this pass had fewer moments: the reads had come sooner
        after = answers(model, deep)
        if after not in ("right", "closed"):
            broken.append(f"{interrupter.where}: {after}")
        if after == "right":
            continue
        if after != "hung":
            with suppress(Exception):
                nb.session(model).close()
        model = deep.stream(budget=deep.minimum + extra)
        deep.right(model, 3)
        if len(broken) == 3:
            break
    assert broken == []


@pytest.mark.parametrize("at", [0, 4, 9])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), ValueError("in the model")], ids=repr)
def test_an_exception_in_a_module_passes_through_and_leaves_the_session_usable(
    deep: Any, at: int, error: BaseException
) -> None:
    model = deep.stream()

    def fail() -> None:
        raise error

    model.before = {at: fail}
    with pytest.raises(type(error)) as raised, torch.inference_mode():
        model(deep.x)
    assert raised.value is error
    model.before = {}
    assert answers(model, deep) == "right"
    deep.assert_state(model.state_dict())
