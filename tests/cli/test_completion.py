"""What the shells offer when the tab key is pressed, without importing torch."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from narrowboat.cli.app import COMMANDS, build_command
from narrowboat.cli.complete import answer, split_line
from narrowboat.cli.completion import SCRIPTS, Shell, script

SECONDS = 60.0  # for a shell to answer, on a busy machine


def _words(*arguments: str) -> list[str]:
    return [line.partition("\t")[0] for line in answer(arguments, build_command())]


def _line(line: str, breaks: str = " \t\n\"'><=;|&(:") -> list[str]:
    return [word.partition("\t")[0] for word in answer(["--line", line, breaks], build_command())]


def test_every_command_is_offered_with_its_help() -> None:
    lines = answer([""], build_command())
    assert lines == [f"{name}\t{help}" for name, (_, help) in COMMANDS.items()]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("pl",), ["plan"]),
        (("zoo", ""), ["list", "save"]),
        (("zoo", "save", "resnet"), ["resnet50", "resnet101"]),
        (("zoo", "save", "-o", "x", "vgg"), ["vgg19"]),
        (("run", "narrowboat.zoo:vgg"), ["narrowboat.zoo:vgg19", ":folders"]),
        (("run", "m", "--io", ""), ["auto", "direct", "buffered"]),
        (("run", "m", "--io=d"), ["--io=direct"]),
        (("run", "--ver"), ["--verify"]),
        (("run", "--verify", "--ver"), []),
        (("inspect", "some"), [":files"]),
        (("generate", "some"), [":folders"]),
        (("run", "m", "--weights", ""), [":files"]),
        (("run", "m", "--budget", ""), []),
        (("run", "m", "--device", "c"), ["cpu", "cuda"]),
        (("completion", ""), ["bash", "zsh", "fish"]),
        (("completion", "bash", ""), []),
        (("--ver",), ["--version"]),
        (("no-such-command", "x", ""), list(COMMANDS)),
        (("run", "--", "--ver"), [":folders"]),
    ],
)
def test_what_may_come_next(words: tuple[str, ...], offered: list[str]) -> None:
    assert _words(*words) == offered


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("narrowboat run narrowboat.zoo:vgg", ["vgg19", ":folders"]),
        ("narrowboat run 'narrowboat.zoo:vgg", ["narrowboat.zoo:vgg19", ":folders"]),
        ("narrowboat run m --io=d", ["direct"]),
        ("narrowboat zoo ", ["list", "save"]),
    ],
)
def test_bash_gets_what_it_puts_behind_a_colon(line: str, offered: list[str]) -> None:
    assert _line(line) == offered


def test_bash_without_colons_among_its_breaks_gets_whole_words() -> None:
    assert _line("narrowboat run narrowboat.zoo:vgg", " =")[0] == "narrowboat.zoo:vgg19"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ([""], False)),
        ("a b", (["a", "b"], False)),
        ("a b ", (["a", "b", ""], False)),
        ("a 'b c", (["a", "b c"], True)),
        ('a "b c', (["a", "b c"], True)),
        ("a b\\ c", (["a", "b c"], False)),
        ("a b\\", (["a", "b"], False)),
    ],
)
def test_a_line_is_split_as_far_as_it_is_typed(line: str, words: tuple[list[str], bool]) -> None:
    assert split_line(line) == words


@pytest.mark.parametrize("words", [[""], *([name, "--"] for name in COMMANDS), ["run", "narrowboat.zoo:"]])
def test_every_command_completes(words: list[str]) -> None:
    assert answer(words, build_command())


def test_completing_imports_no_torch() -> None:
    code = f"""
import sys
from narrowboat.cli.app import build_command
from narrowboat.cli.complete import answer
for name in {list(COMMANDS)}:
    answer([name, "--"], build_command())
answer(["run", "narrowboat.zoo:"], build_command())
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("shell", list(Shell))
def test_the_script_is_printed_as_it_is_shipped(narrowboat: Any, shell: Shell) -> None:
    finished = narrowboat("completion", shell.value)
    assert (finished.code, finished.out) == (0, script(shell))
    assert "__complete" in finished.out


def test_an_unknown_shell_is_exit_2(narrowboat: Any) -> None:
    assert narrowboat("completion", "csh").code == 2


def _need(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    return found


@pytest.fixture
def shell_folder(tmp_path: Path) -> Path:
    """A folder with a command ``narrowboat`` in ``a bin`` and a file ``weights.bin``; it is the user's home, too."""
    folder = tmp_path / "a bin"
    folder.mkdir()
    command = folder / "narrowboat"
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m narrowboat \"$@\"\n")
    command.chmod(0o755)
    (tmp_path / "weights.bin").write_text("")
    for shell, name in SCRIPTS.items():
        (tmp_path / name).write_text(script(shell))
    return tmp_path


def _environment(folder: Path) -> dict[str, str]:
    path = f"{folder / 'a bin'}:{os.environ.get('PATH', '')}"
    kept = {name: value for name, value in os.environ.items() if name.startswith("NARROWBOAT")}
    return {**kept, "HOME": str(folder), "PATH": path, "TERM": "dumb", "LC_ALL": "C.UTF-8", "PS1": "ready> "}


def _type(command: list[str], folder: Path, setup: str, typed: str, wanted: str) -> str:
    """What a shell on a terminal shows when a line is typed and the tab key pressed; returns when it is there."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe(command[0], command, _environment(folder))
    seen, until = "", time.monotonic() + SECONDS
    said = 0  # 0: nothing, 1: set up, 2: the line
    try:
        while wanted not in seen and time.monotonic() < until:
            if not select.select([terminal], [], [], 0.1)[0]:
                continue
            try:
                seen += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # it has ended
                break
            if said == 0 and "ready> " in seen:
                os.write(terminal, f"{setup}; echo set''up\n".encode())
                said = 1
            elif said == 1 and "setup" in seen and seen.rpartition("setup")[2].count("ready> "):
                os.write(terminal, f"{typed}\t".encode())
                said, seen = 2, ""
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)
    return seen


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("narrowboat comp", "completion "),
        ("narrowboat run narrowboat.zoo:vg", "narrowboat.zoo:vgg19"),
        ("narrowboat inspect wei", "weights.bin"),
    ],
)
def test_bash_completes_on_a_terminal(shell_folder: Path, typed: str, wanted: str) -> None:
    command = [_need("bash"), "--norc", "--noprofile", "-i"]
    assert wanted in _type(command, shell_folder, "source narrowboat.bash", typed, wanted)


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("narrowboat comp", "letion"),
        ("narrowboat run narrowboat.zoo:vg", "g19"),
        ("narrowboat inspect wei", "ghts.bin"),
    ],
)
def test_zsh_completes_on_a_terminal(shell_folder: Path, typed: str, wanted: str) -> None:
    command = [_need("zsh"), "-f", "-i"]
    setup = "autoload -Uz compinit; compinit -u -D; source ./_narrowboat"
    assert wanted in _type(command, shell_folder, setup, typed, wanted)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("narrowboat comp", ["completion"]),
        ("narrowboat run narrowboat.zoo:vg", ["narrowboat.zoo:vgg19"]),
        ("narrowboat run m --io=d", ["--io=direct"]),
        ("narrowboat inspect wei", ["weights.bin"]),
    ],
)
def test_fish_completes(shell_folder: Path, line: str, offered: list[str]) -> None:
    command = [_need("fish"), "--no-config", "-c", f"source narrowboat.fish; complete -C '{line}'"]
    environment = _environment(shell_folder)
    done = subprocess.run(
        command, cwd=shell_folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert [row.partition("\t")[0] for row in done.stdout.splitlines()] == offered, done.stderr


def test_the_scripts_have_no_mistake_that_a_checker_finds(shell_folder: Path) -> None:
    checked = 0
    for tool, arguments in {
        "shellcheck": ["-s", "bash", "narrowboat.bash"],
        "bash": ["-n", "narrowboat.bash"],
        "zsh": ["-n", "_narrowboat"],
        "fish": ["-n", "narrowboat.fish"],
    }.items():
        if shutil.which(tool) is not None:
            done = subprocess.run([tool, *arguments], cwd=shell_folder, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            checked += 1
    assert checked  # bash at least
