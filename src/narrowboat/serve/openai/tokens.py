"""Text to tokens and back, from a model folder, without transformers (which would import torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from narrowboat.errors import BadRequestError, ModelError
from narrowboat.serve.openai.chat_template import ChatTemplate, find_template

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokens:
    """The tokenizer of a model folder.

    Args:
        folder: with ``tokenizer.json``, and what else says which tokens mean what.

    Attributes:
        ends: tokens that end a text.
        begin: the token that begins one; None if there is none.
        padding: the token behind a text that is shorter than the window.
        vocabulary: tokens that the model knows.

    Raises:
        ModelError: the folder has no ``tokenizer.json``, or a file of it cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json: its text cannot be turned into tokens")
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise ModelError(f"{path} cannot be used: {error}") from error
        # Folders keep how they were trained here; clients' texts are neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _read(folder / "tokenizer_config.json")
        config = _read(folder / "config.json")
        special = _special_tokens({**_read(folder / "special_tokens_map.json"), **settings})
        stated = _read(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
        ends = stated if isinstance(stated, list) else [stated]
        self.ends = frozenset(
            token for token in (*ends, self._number(special.get("eos_token"))) if isinstance(token, int)
        )
        self._prefix: list[int] = []
        begin, padding = self._number(special.get("bos_token")), self._number(special.get("pad_token"))
        self.begin = begin if begin is not None else config.get("bos_token_id")
        self.padding = int(next((token for token in (padding, config.get("pad_token_id")) if token is not None), 0))
        size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
        self.vocabulary = size if isinstance(size, int) else self._tokenizer.get_vocab_size()
        source = find_template(folder, settings)
        self._template = None if source is None else ChatTemplate(source, special)
        # Some folders say only in their settings that a text begins with a token of its own.
        begins = settings.get("add_bos_token") is True and begin is not None and self.encode("")[:1] != [begin]
        self._prefix = [begin] if begins and begin is not None else []
        decoder = json.loads(path.read_text(encoding="utf-8")).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        self._bytes = any(part.get("type") == "ByteLevel" for part in parts)

    def _number(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text.

        Args:
            text: any.
            special: with the tokens that the model wants around it.
        """
        ids = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        return self._prefix + ids if special else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the assistant's answer begins.

        Raises:
            BadRequestError: the folder has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise BadRequestError("this model has no chat template: use /v1/completions", details={"param": "model"})
        return self.encode(self._template.render(messages), special=False)

    def raw(self, token: int) -> bytes:
        """What one token stands for; it may be a part of a character."""
        written = self._tokenizer.id_to_token(token)
        if written is None:
            return b""
        if len(written) == 6 and written.startswith("<0x") and written.endswith(">"):
            return bytes([int(written[3:5], 16)])
        if self._bytes and all(letter in _alphabet() for letter in written):
            return bytes(_alphabet()[letter] for letter in written)
        return (written if self._bytes else written.replace("▁", " ")).encode()

    def shown(self, token: int) -> str:
        """The same as text; as ``bytes:\\xe2`` where it is a part of a character."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with (GPT-2's)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    return told if isinstance(told, dict) else {}
