"""``narrowboat completion``: print the script that teaches a shell to complete narrowboat's command line."""

from __future__ import annotations

import sys
from enum import StrEnum
from importlib import resources
from typing import Annotated

import typer


class Shell(StrEnum):
    """The shells that are known."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


SCRIPTS = {Shell.BASH: "narrowboat.bash", Shell.ZSH: "_narrowboat", Shell.FISH: "narrowboat.fish"}
"""Files beside this one, under the names by which the shells find them in their folders."""


def completion(shell: Annotated[Shell, typer.Argument(help="The shell to print it for.")]) -> None:
    """Print the script that completes commands, options and values with the tab key.

    For one session: eval "$(narrowboat completion bash)", the same with zsh, or narrowboat completion fish | source.
    For good, write it where the shell looks for such files; docs/install.md says where.
    """
    sys.stdout.write(script(shell))


def script(shell: Shell) -> str:
    """The text of the script."""
    return resources.files("narrowboat.cli").joinpath("shell", SCRIPTS[shell]).read_text(encoding="utf-8")
