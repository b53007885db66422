"""A folder's chat template, rendered as transformers renders it, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from narrowboat.errors import BadRequestError, ModelError


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, by which templates mark what an assistant said for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dictionary:
    """``dict(...)`` in a template, without the rest of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template cannot store {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """Turns messages into the text that a model was taught to continue.

    Args:
        source: Jinja.
        special: the tokenizer's special tokens by name, such as ``bos_token``.

    Raises:
        ModelError: it is no template.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dictionary(), namespace=_Namespace)
        self._special = dict(special)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template cannot be used: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, up to where the assistant's answer begins.

        Args:
            messages: with ``role`` and ``content``, of plain JSON types.

        Raises:
            BadRequestError: the template refuses the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except Exception as error:  # what a template does with strange messages can fail in any way
            told = " ".join(str(error).split())[:300] or type(error).__name__
            raise BadRequestError(
                f"the model's chat template refuses the messages: {told}", details={"param": "messages"}
            ) from error


def find_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The folder's chat template; None if it has none.

    Args:
        folder: of the tokenizer.
        settings: of ``tokenizer_config.json``.

    Raises:
        ModelError: its file cannot be read.
    """
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        try:
            return alone.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{alone} cannot be used: {error}") from error
    named = settings.get("chat_template")
    if isinstance(named, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, dict)}.get("default")
    return named if isinstance(named, str) else None
