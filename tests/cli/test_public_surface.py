"""``import narrowboat as nb``: quick, complete, and the same whatever was imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

import narrowboat as nb


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def test_import_loads_no_torch() -> None:
    finished = _run("import sys, narrowboat, narrowboat.stream; sys.exit('torch' in sys.modules)")
    assert finished.returncode == 0, finished.stderr


ORDERS = [
    "import narrowboat.stream.session, narrowboat.checkpoint.pack; import narrowboat as nb",
    "import narrowboat as nb; nb.session; nb.stream; nb.pack; import narrowboat.stream.session",
    "import narrowboat.train.recipes.loop; import narrowboat as nb",
]
# One process imports torch, and forks a child for each order.
EACH = """
import os, sys, traceback, types
import torch
assert not [name for name in sys.modules if name.startswith("narrowboat")]
for imports in ORDERS:
    child = os.fork()
    if child == 0:
        try:
            exec(imports)
            assert callable(nb.stream) and callable(nb.session) and isinstance(nb.pack, types.FunctionType)
            from narrowboat.stream import stream
            from narrowboat.stream.session import Session
            assert nb.Session is Session and callable(stream)
            assert issubclass(nb.errors.BudgetError, nb.NarrowboatError)
            try:
                nb.stream()
            except TypeError as error:
                assert "stream()" in str(error), error
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, imports
"""


def test_every_name_works_after_any_order_of_imports() -> None:
    finished = _run(f"ORDERS = {ORDERS!r}\n{EACH}")
    assert finished.returncode == 0, finished.stderr


def test_the_training_step_is_the_one_of_its_room() -> None:
    from narrowboat.train.step import TrainStep, train_step

    assert nb.train_step is train_step
    assert nb.TrainStep is TrainStep


def test_every_public_name_can_be_had() -> None:
    found = {name: getattr(nb, name) for name in nb.__all__}
    assert {"TrainStep", "checkpoint_plan", "train_step"} <= found.keys()
    assert all(callable(found[name]) for name in found.keys() - {"errors"})


def test_every_command_is_known_without_torch() -> None:
    finished = _run(
        "import sys\n"
        "from narrowboat.cli.app import COMMANDS, build_command\n"
        "assert set(build_command().commands) == set(COMMANDS) >= {'plan', 'run', 'train', 'tasks'}\n"
        "import narrowboat.cli.train, narrowboat.cli.plan\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert finished.returncode == 0, finished.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="sail"):
        nb.sail  # noqa: B018


def test_every_public_name_is_listed() -> None:
    assert set(nb.__all__) <= set(dir(nb))
