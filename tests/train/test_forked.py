"""A forked child has none of the threads that spill: it is told at once, and does not wait for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import narrowboat as nb
from narrowboat.errors import BudgetError, TrainingError
from narrowboat.train.forked import Home
from train_kit import cross_entropy, mlp
from train_step_kit import adam, vectors

pytestmark = pytest.mark.usefixtures("small_things_count")


def in_child(call: Callable[[], bool]) -> bool:
    """Whether ``call`` gave True in a forked child, within ten seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if call() else 2
        finally:
            os._exit(code)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def refuses(call: Callable[[], Any]) -> bool:
    try:
        call()
    except TrainingError as error:
        return "forked" in str(error) and "spawn" in str(error)
    return False


def test_home_is_left_by_a_fork() -> None:
    home = Home()
    assert not home.left
    home.check()
    assert in_child(lambda: home.left and refuses(home.check))


def test_a_step_with_a_spill_folder_refuses_and_can_be_closed(tmp_path: Path) -> None:
    model = mlp()
    (batch,) = vectors(64)
    with nb.train_step(model, cross_entropy, adam(model), budget="1GiB", spill=tmp_path) as step:
        step(*batch)

        def child() -> bool:
            told = all(refuses(lambda call=call: call(*batch)) for call in (step, step.prepare, step.backward))
            step.close()
            return told

        assert in_child(child)
        step(*batch)


def test_a_plan_with_a_spill_folder_refuses_and_can_be_closed(tmp_path: Path) -> None:
    (batch,) = vectors(256)
    with pytest.raises(BudgetError) as refused:
        nb.checkpoint_plan(mlp(), batch[0], 1)
    model = nb.checkpoint_plan(mlp(), batch[0], refused.value.minimum * 2, spill=tmp_path)

    def child() -> bool:
        told = refuses(lambda: model(batch[0]))
        model.narrowboat.close()  # type: ignore[union-attr]
        return told

    cross_entropy(model(batch[0]), batch[1]).backward()
    assert in_child(child)
    cross_entropy(model(batch[0]), batch[1]).backward()
