"""A model folder as a text task: how that is written in ``tasks.yaml``, and what its clients have to know. No torch.

``text:FOLDER?window=64`` is the folder's causal language model over a window of 64 tokens: one job computes the logits
that follow one position. ``embed:FOLDER?window=128`` is its sentence embedding. A task is analysed for one shape of
input, so the window is part of what the model is.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

from narrowboat.errors import ModelError, UsageError

Kind = Literal["causal", "embedding"]
_FORM = re.compile(r"(text|embed):(?P<folder>[^?]+)\?(?P<options>.*)", re.DOTALL)
_KINDS: dict[str, Kind] = {"text": "causal", "embed": "embedding"}
_LARGEST = 1 << 20  # tokens; more than any model has
# sentence-transformers' names of how the tokens' vectors become one, and those that older folders have.
POOLING = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}


@dataclass(frozen=True)
class TextSpec:
    """A model folder, used for text.

    Attributes:
        kind: what comes out: logits of the next token, or an embedding.
        folder: of the model.
        window: tokens that one job takes.
    """

    kind: Kind
    folder: Path
    window: int

    def __str__(self) -> str:
        """As it is written in ``tasks.yaml``."""
        word = next(word for word, kind in _KINDS.items() if kind == self.kind)
        return f"{word}:{self.folder}?window={self.window}"


@dataclass(frozen=True)
class SentenceForm:
    """How an embedding is made of a network's output.

    Attributes:
        pooling: a key of ``POOLING``.
        normalise: to length one.
    """

    pooling: str
    normalise: bool


def parse_text(spec: str) -> TextSpec | None:
    """What a MODEL says, if it is a folder used for text; None if it is something else.

    Raises:
        UsageError: it is, and its window is missing or no number of tokens.
    """
    found = _FORM.fullmatch(spec)
    if found is None:
        return None
    options = parse_qsl(found["options"], keep_blank_values=True)
    if [name for name, _ in options] != ["window"]:
        raise UsageError(f"{spec!r} takes one option, the tokens of a job: {found[1]}:FOLDER?window=64")
    text = options[0][1]
    if not text.isascii() or not text.isdecimal() or not 0 < int(text[:9]) <= _LARGEST or len(text) > 9:
        raise UsageError(f"{spec!r}: a window is a number of tokens, such as 64, not {text!r}")
    return TextSpec(_KINDS[found[1]], Path(found["folder"]), int(text))


def rebase(spec: str, folder: Path) -> str:
    """The same MODEL with the path in it, if there is one, meant from ``folder``.

    Raises:
        UsageError: as :func:`parse_text`.
    """
    text = parse_text(spec)
    if text is not None:
        return str(TextSpec(text.kind, folder / text.folder.expanduser(), text.window))
    return spec if ":" in spec else str(folder / spec)


def facts_of(model_spec: str, folder: Path) -> dict[str, Any]:
    """What a gateway has to know of a task's model to talk text with it.

    Args:
        model_spec: the task's ``model``.
        folder: that its path is meant from: that of ``tasks.yaml``.

    Returns:
        ``{"text": "causal" or "embedding", "tokenizer": folder, "window": tokens}``; empty for other models.

    Raises:
        UsageError: as :func:`parse_text`.
    """
    text = parse_text(rebase(model_spec, folder))
    return {} if text is None else {"text": text.kind, "tokenizer": str(text.folder), "window": text.window}


def sentence_form(folder: Path) -> SentenceForm:
    """How the folder wants its sentence embeddings made; the mean of the tokens' vectors where it says nothing.

    Raises:
        ModelError: in a way that is not known here.
    """
    listed = _read(folder / "modules.json")
    if listed is None:
        return SentenceForm("mean", False)
    modules = [(str(entry.get("type", "")).rpartition(".")[2], str(entry.get("path", ""))) for entry in listed]
    others = [name for name, _ in modules if name not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise ModelError(f"{folder}: its sentence embedding has a {others[0]} layer, which is not supported")
    pooling = next((path for name, path in modules if name == "Pooling"), None)
    settings = _read(folder / pooling / "config.json") if pooling is not None else None
    return SentenceForm(_pooling(settings or {}, folder), any(name == "Normalize" for name, _ in modules))


def _pooling(settings: dict[str, Any], folder: Path) -> str:
    named = settings.get("pooling_mode")
    if named is None:
        modes = [mode for mode, key in POOLING.items() if settings.get(key)] or ["mean"]
    else:
        modes = [named] if isinstance(named, str) else list(named)
    if len(modes) != 1 or modes[0] not in POOLING:
        raise ModelError(
            f"{folder}: pooling by {', '.join(map(str, modes))} is not supported: one of {', '.join(POOLING)}"
        )
    return modes[0]


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
