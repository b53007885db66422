"""The command line as plain data, for what is made from it: completion and manual pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument or an option.

    Attributes:
        name: of the function's parameter.
        spellings: ``("-o", "--output")``; empty for an argument.
        value: what stands for its value in help, such as ``FILE``; empty for a flag.
        choices: the values it takes, if they can be listed.
        default: in words; empty if there is none worth telling.
        required, repeated: as said.
        help: one or two sentences.
    """

    name: str
    spellings: tuple[str, ...]
    value: str
    choices: tuple[str, ...]
    default: str
    required: bool
    repeated: bool
    help: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command, or a group of them: ``command`` is what was found, for looking further into it."""

    name: str
    help: str
    parameters: tuple[Parameter, ...]
    commands: Mapping[str, Any]

    @property
    def arguments(self) -> tuple[Parameter, ...]:
        """In the order in which they are written."""
        return tuple(parameter for parameter in self.parameters if not parameter.spellings)

    @property
    def options(self) -> tuple[Parameter, ...]:
        """``--help`` is the last."""
        return tuple(parameter for parameter in self.parameters if parameter.spellings)


def read_command(name: str, command: Any) -> Command:
    """``command`` as data. A command that is loaded when called is loaded; those below it are not."""
    load = getattr(command, "_load", None)  # a `LazyCommand`
    real = load() if load is not None else command
    context = real.make_context(name, [], resilient_parsing=True)
    parameters = tuple(_read(one, context) for one in real.get_params(context) if not getattr(one, "hidden", False))
    below = {name: one for name, one in getattr(real, "commands", {}).items() if not getattr(one, "hidden", False)}
    return Command(name, (real.help or "").strip(), parameters, below)


def _read(parameter: Any, context: Any) -> Parameter:
    is_option = parameter.param_type_name == "option"
    flag = is_option and bool(parameter.is_flag or parameter.count)
    choices = tuple(str(item.value) for item in parameter.shell_complete(context, "") if item.type == "plain")
    value = "" if flag else parameter.metavar or ("|".join(choices) if choices else parameter.name.upper())
    return Parameter(
        name=parameter.name,
        spellings=(*parameter.opts, *parameter.secondary_opts) if is_option else (),
        value=value,
        choices=choices,
        default="" if flag or parameter.required else _in_words(parameter.default),
        required=bool(parameter.required),
        repeated=bool(parameter.multiple or parameter.nargs != 1),
        help=(getattr(parameter, "help", None) or "").strip(),
    )


def _in_words(default: Any) -> str:
    if default is None or default == "" or default == () or callable(default):
        return ""
    return str(getattr(default, "value", default))
