"""The table of commands. A command's module is imported when the command is called, so help is quick."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from narrowboat import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("narrowboat.cli.doctor:doctor", "Say what this machine offers, and what each absence means."),
    "inspect": ("narrowboat.cli.inspect:inspect", "List the tensors of a weights file without loading them."),
    "pack": ("narrowboat.cli.pack:pack", "Rewrite a weights file for streaming: aligned, in execution order."),
    "profile": ("narrowboat.cli.profile:profile", "Measure what a model costs on this machine."),
    "plan": ("narrowboat.cli.plan:plan", "Show what would be resident, what streamed, and how fast."),
    "run": ("narrowboat.cli.run:run", "Run a model inside a byte budget."),
    "generate": ("narrowboat.cli.generate:generate", "Text from a language model inside a byte budget."),
    "train": ("narrowboat.cli.train:train", "Train a model inside a byte budget, by a ready recipe."),
    "tasks": ("narrowboat.cli.tasks:app", "Many models in one budget, with deadlines that are kept."),
    "serve": ("narrowboat.cli.serve:serve", "Tasks over HTTP and gRPC, with a page to watch them."),
    "bench": ("narrowboat.cli.bench:bench", "Measure a model against the alternatives."),
    "zoo": ("narrowboat.cli.zoo:app", "Published architectures to experiment with."),
    "demo": ("narrowboat.cli.demo:demo", "A real network and a large one, each in a fraction of its bytes."),
}
"""Command: its function (or typer app) as ``module:name``, and its help in one line."""


class LazyCommand(TyperCommand):
    """A command known by its name and one line of help, until it is called."""

    def __init__(self, name: str, target: str, short_help: str) -> None:
        super().__init__(name=name, help=short_help)
        self._target = target

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the real command; whoever invokes takes the command from it."""
        return self._load().make_context(info_name, args, parent=parent, **extra)

    def _load(self) -> Any:
        module, _, name = self._target.partition(":")
        target = getattr(importlib.import_module(module), name)
        if not isinstance(target, typer.Typer):
            function = target
            target = typer.Typer(add_completion=False)
            target.command(name=self.name)(function)
        return typer.main.get_command(target)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"narrowboat {__version__}")
        raise typer.Exit


def narrowboat(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run, schedule and train PyTorch models inside a fixed number of bytes."""


def build_command() -> TyperGroup:
    """The whole command line."""
    app = typer.Typer(add_completion=False, no_args_is_help=True)
    app.callback()(narrowboat)
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, (target, short_help) in COMMANDS.items():
        group.add_command(LazyCommand(name, target, short_help))
    return group
