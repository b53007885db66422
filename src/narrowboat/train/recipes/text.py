"""Text in a file: blocks of tokens for a language model, or one labelled text a line for a classifier.

Tokens are the model folder's tokenizer's; without one, a token is a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from narrowboat.errors import ModelError, UsageError

BYTES = 256  # tokens of a model without a tokenizer
_PIECE = 1 << 20  # characters tokenised at once
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "vocab.json", "vocab.txt")
Encode = Callable[[str], list[int]]


def find_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder; None where it has none.

    Raises:
        ModelError: there is one that cannot be used.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{folder} has a tokenizer that cannot be used: {told}") from error


def encoder(tokenizer: Any) -> Encode:
    """A function from text to token numbers, without marks of beginning and end; UTF-8 bytes without a tokenizer."""
    if tokenizer is None:
        return lambda text: list(text.encode())
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def read_tokens(path: Path, tokenizer: Any) -> numpy.ndarray:
    """All tokens of a text file in order: bytes that stay in the file, or int32.

    Raises:
        UsageError: no such file, empty, or (for a tokenizer) not UTF-8.
    """
    _check_file(path)
    if tokenizer is None:
        return numpy.memmap(path, dtype=numpy.uint8, mode="r")
    encode, pieces = encoder(tokenizer), []
    try:
        with path.open(encoding="utf-8") as file:
            # Whole lines, so that no word is torn apart; only white space between two pieces may be told otherwise.
            while lines := file.readlines(_PIECE):
                pieces.append(numpy.array(encode("".join(lines)), dtype=numpy.int32))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    return numpy.concatenate(pieces)


class Blocks(Dataset[Tensor]):
    """A long text in pieces of ``length`` + 1 tokens, each beginning with the last token of the one before.

    A model predicts each token but the first from those before it; what is left at the end is dropped.

    Args:
        tokens: one-dimensional, of integers.
        length: tokens that a model sees at once.
        where: the text's name in errors.

    Raises:
        UsageError: the text is shorter than one block.
    """

    def __init__(self, tokens: numpy.ndarray, length: int, where: str = "the text") -> None:
        self._tokens, self._length = tokens, length
        if not len(self):
            raise UsageError(
                f"{where} has {len(tokens)} tokens, fewer than one block of {length} and its next token: give more "
                "text or a smaller --length"
            )

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> Tensor:
        """Tokens, int64 [length + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._length
        return torch.from_numpy(self._tokens[start : start + self._length + 1].astype(numpy.int64))


class LabelledTexts(Dataset[tuple[Tensor, Tensor, int]]):
    """A file with ``label<TAB>text`` in each line; the classes are its labels in alphabetical order.

    Every text has ``length`` tokens, cut or filled up: a plan for a training step is made for one shape, and texts of
    many lengths would each be measured anew.

    Args:
        path: the file, UTF-8.
        encode: from text to token numbers.
        length: tokens of each text.
        filler: the token that short texts are filled up with.

    Attributes:
        classes: labels.

    Raises:
        UsageError: no such file, empty, a line without a label, or fewer than two labels.
    """

    def __init__(self, path: Path, encode: Encode, length: int, filler: int = 0) -> None:
        _check_file(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text: {error}") from error
        found = []
        for number, line in enumerate(lines, start=1):
            label, tab, text = line.partition("\t")
            if not line.strip():
                continue
            if not tab or not label.strip():
                raise UsageError(f"{path}, line {number}: write label<TAB>text")
            found.append((label.strip(), text))
        self.classes = tuple(sorted({label for label, _ in found}))
        if len(self.classes) < 2:
            raise UsageError(f"{path} has {len(self.classes)} labels: a classifier needs two or more")
        numbers = {label: number for number, label in enumerate(self.classes)}
        self._texts = [(text, numbers[label]) for label, text in found]
        self._encode, self._length, self._filler = encode, length, filler

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Tokens and which of them are text (1) or filling (0), both int64 [length], and the class."""
        text, label = self._texts[index]
        # An empty text is one token of filling: attention to nothing has no result.
        tokens = self._encode(text)[: self._length] or [self._filler]
        missing = self._length - len(tokens)
        mask = torch.tensor([1] * len(tokens) + [0] * missing)
        return torch.tensor(tokens + [self._filler] * missing), mask, label


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{path} is no text file")
    if not path.stat().st_size:
        raise UsageError(f"{path} is empty")
