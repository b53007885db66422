"""The table of commands. A command's module is imported when the command is called, so help is quick."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

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
    "deploy": ("narrowboat.cli.deploy:deploy", "The same on the nodes of a Ray cluster."),
    "bench": ("narrowboat.cli.bench:bench", "Measure a model against the alternatives."),
    "report": ("narrowboat.cli.report:report", "One page about what a command measured, with pictures."),
    "zoo": ("narrowboat.cli.zoo:app", "Published architectures to experiment with."),
    "demo": ("narrowboat.cli.demo:demo", "A real network and a large one, each in a fraction of its bytes."),
    "completion": ("narrowboat.cli.completion:completion", "The script that has a shell complete what you type."),
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
        """The real command; its module is imported now."""
        module, _, name = self._target.partition(":")
        target = getattr(importlib.import_module(module), name)
        if not isinstance(target, typer.Typer):
            function = target
            target = typer.Typer(add_completion=False)
            target.command(name=self.name)(function)
        return typer.main.get_command(target)


def _version(context: typer.Context, parameter: typer.CallbackParam, given: bool) -> bool:
    """For both options below, in whichever order they stand: the second to be looked at knows of the first."""
    known = {**context.params, parameter.name: given}
    if known.get("version") and "json" in known and not context.resilient_parsing:
        from narrowboat.cli.version import print_version

        print_version(as_json=known["json"])
        raise typer.Exit
    return given


def narrowboat(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print what this is and was built from."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", callback=_version, is_eager=True, help="With --version: one JSON document.")
    ] = False,
) -> None:
    """Run, schedule and train PyTorch models inside a fixed number of bytes."""
    if json:
        raise typer.BadParameter("stands behind a command that reports, or beside --version", param_hint="--json")


def build_command() -> TyperGroup:
    """The whole command line."""
    app = typer.Typer(add_completion=False, no_args_is_help=True)
    app.callback()(narrowboat)
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, (target, short_help) in COMMANDS.items():
        group.add_command(LazyCommand(name, target, short_help))
    return group
