"""Exit codes, error lines, and what may not be imported."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from narrowboat import __version__
from narrowboat.cli import app
from narrowboat.errors import BudgetError, QuantityError, StorageError


def _add_command(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    module = types.ModuleType("narrowboat_test_command")
    module.command = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(app.COMMANDS, "trial", ("narrowboat_test_command:command", "A command of the tests."))


def _raising(error: BaseException) -> Callable[..., None]:
    def command(json: bool = False) -> None:
        raise error

    return command


def test_a_refused_budget_is_one_red_line_and_exit_1(narrowboat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_command(monkeypatch, _raising(BudgetError("too small:\n  give 5", minimum=5, limiter="fc")))
    finished = narrowboat("trial")
    assert (finished.code, finished.out, finished.err) == (1, "", "error: too small: give 5\n")


def test_with_json_the_error_is_a_document_too(narrowboat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_command(monkeypatch, _raising(BudgetError("too small", minimum=5, limiter="fc")))
    finished = narrowboat("trial", "--json")
    assert finished.code == 1
    assert finished.json() == {"error": {"type": "BudgetError", "message": "too small", "minimum": 5, "limiter": "fc"}}
    assert finished.err == "error: too small\n"


@pytest.mark.parametrize(
    ("error", "code"), [(QuantityError("12 apples"), 2), (StorageError("disk gone"), 1), (KeyboardInterrupt(), 130)]
)
def test_exit_code_tells_usage_from_failure_from_interruption(
    narrowboat: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    _add_command(monkeypatch, _raising(error))
    assert narrowboat("trial").code == code


@pytest.mark.parametrize("arguments", [("sail",), ("inspect",), ("inspect", "a", "--no-such-option"), ("zoo", "x")])
def test_wrong_usage_is_exit_2(narrowboat: Any, arguments: tuple[str, ...]) -> None:
    finished = narrowboat(*arguments)
    assert finished.code == 2
    assert "Usage:" in finished.err


def test_markup_in_a_message_is_printed_as_it_is(narrowboat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_command(monkeypatch, _raising(StorageError("no [bold]layer[/] x[0]")))
    assert narrowboat("trial").err == "error: no [bold]layer[/] x[0]\n"


def test_help_lists_every_command_and_version_is_printed(narrowboat: Any) -> None:
    helped = narrowboat("--help")
    assert helped.code == 0
    for name in app.COMMANDS:
        assert name in helped.out
    assert narrowboat("--version").out.splitlines()[0] == f"narrowboat {__version__}"


def test_help_imports_no_torch() -> None:
    code = """
import sys
from narrowboat.cli.main import main
try:
    main(["--help"])
except SystemExit as finished:
    sys.exit(finished.code or "torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_the_openmp_policy_is_set_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os, sys
from narrowboat.cli import main as entry
loaded = []
real = entry.apply_openmp_policy
entry.apply_openmp_policy = lambda: (loaded.append("torch" in sys.modules), real())[1]
try:
    entry.main(["--version"])
except SystemExit:
    sys.exit(loaded != [False])
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    script = f"'{sys.executable}' -m narrowboat zoo list | true; exit ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", script], check=False, capture_output=True, text=True)
    assert finished.stderr == ""
