"""Text that may be sent."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from narrowboat.serve.openai.spoken import Characters, Stops
from narrowboat.serve.openai.tokens import Tokens
from serve_openai_kit import tokenizer


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer(folder)
    return Tokens(folder)


def spoken(tokens: Tokens, ids: list[int], before: list[int] | None = None) -> list[str]:
    characters = Characters(tokens.decode, before or [])
    return [*(characters.add(token) for token in ids), characters.end()]


@pytest.mark.parametrize("text", ["plain words", "déjà vu 日本語 🚤🚤 x", "  spaces  ", "क्षत्रिय ñ"])
def test_characters_come_whole_and_none_is_lost(tokens: Tokens, text: str) -> None:
    pieces = spoken(tokens, tokens.encode(text))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_a_broken_character_is_said_at_last(tokens: Tokens) -> None:
    boat = tokens.encode("🚤")
    assert "".join(spoken(tokens, boat[:-1])) == tokens.decode(boat[:-1])
    lead = next(token for token in range(400) if tokens.raw(token) == b"\xf0")
    many = spoken(tokens, [lead] * 30)
    assert "".join(many) == "�" * 30
    assert sum(map(bool, many)) >= 3, "not only at the end"


def test_what_came_before_decides_about_the_space(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<unk>": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = Tokens(tmp_path)
    assert "".join(spoken(tokens, [1, 1])) == "b b"
    assert "".join(spoken(tokens, [1, 1], [0])) == " b b"
    assert tokens.shown(1) == " b" and tokens.raw(9) == b""


def test_special_tokens_are_not_said(tokens: Tokens) -> None:
    assert "".join(spoken(tokens, [1, *tokens.encode("hi"), 0, 0, *tokens.encode(" there")])) == "hi there"


def said(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    held, out = Stops(stops), []
    for piece in pieces:
        text, stopped = held.add(piece)
        out.append(text)
        if stopped:
            return out, True
    return [*out, held.end()], False


def test_a_stop_string_ends_the_text_and_is_not_in_it() -> None:
    assert said(["END"], ["one E", "ND two"]) == (["one ", ""], True)
    assert said(["b", "abc"], ["ab"]) == (["a"], True)
    assert said(["\n\n"], ["a\n", "b\n", "\nc"]) == (["a", "\nb", ""], True)
    assert said(["aab"], list("aaab"))[0] == ["", "", "a", ""]


def test_what_only_begins_a_stop_string_is_said_later() -> None:
    assert said(["END"], ["one E", "N", "x"]) == (["one ", "", "ENx", ""], False)
    assert said(["END"], ["the EN"]) == (["the ", "EN"], False)
    assert said([], ["a", "b"]) == (["a", "b", ""], False)


def test_however_a_text_is_cut_nothing_of_a_stop_string_gets_out() -> None:
    rng = random.Random(4)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=rng.randint(0, 14)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        pieces, at = [], 0
        while at < len(text):
            size = rng.randint(1, 4)
            pieces.append(text[at : at + size])
            at += size
        found = sorted((len(text[: text.index(stop)]) + len(stop), text.index(stop)) for stop in stops if stop in text)
        out, stopped = said(stops, pieces)
        assert stopped == bool(found)
        if not found:
            assert "".join(out) == text
        else:  # of those that are whole in the piece that brought the first one, the earliest
            assert not any(stop in "".join(out) for stop in stops)
            assert text.startswith("".join(out))
