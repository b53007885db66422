"""Bearer tokens: read only from files that are private, compared in constant time, and kept as digests."""

from __future__ import annotations

import hmac
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from narrowboat.errors import ForbiddenError, TokenFileError, UnauthorizedError
from narrowboat.serve.guard.rights import Right
from narrowboat.serve.guard.tokens import Caller, Tokens, load_tokens

USE, ADMIN = "u" * 16, "administrators-token"


def written(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    file = folder / "tokens"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    file.chmod(mode)
    return file


def may(tokens: Tokens, authorization: bytes | None, right: Right) -> Caller:
    return tokens.authorise(tokens.identify(authorization), right)


def test_a_file_gives_each_token_its_right(tmp_path: Path) -> None:
    tokens = load_tokens(written(tmp_path, f"# ours\nuse {USE}\n\nadmin {ADMIN} # the boss\n"), {})
    assert not may(tokens, f"Bearer {USE}".encode(), "use").admin
    assert may(tokens, f"bearer  {ADMIN}".encode(), "admin").admin


def test_the_environment_gives_tokens_too_and_no_child_inherits_them() -> None:
    environment = {"NARROWBOAT_TOKEN": USE, "NARROWBOAT_ADMIN_TOKEN": ADMIN, "HOME": "/"}
    tokens = load_tokens(None, environment)
    assert environment == {"HOME": "/"}
    assert may(tokens, f"Bearer {ADMIN}".encode(), "admin").admin
    with pytest.raises(ForbiddenError):
        may(tokens, f"Bearer {USE}".encode(), "admin")


def test_without_tokens_everyone_may_do_everything() -> None:
    tokens = load_tokens(None, {})
    assert not tokens
    assert may(tokens, None, "admin").admin


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_file_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(TokenFileError, match="chmod 600"):
        load_tokens(written(tmp_path, f"use {USE}\n", mode), {})


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, f"use {USE}\n")
    owner = file.stat().st_uid
    if owner == 0:
        os.chown(file, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(TokenFileError, match="another user"):
        load_tokens(file, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no token"),
        ("# nothing\n\n", "holds no token"),
        (f"use {USE}\nuse {USE}\n", "the same token as"),
        (f"use {USE}\nadmin {USE}\n", "the same token as"),
        ("use short\n", "16 at least"),
        (f"root {USE}\n", "line 1"),
        (f"{USE}\n", "line 1"),
        (f"use {USE} {ADMIN}\n", "line 1"),
        ("use \u00fcmlaut-and-more-letters\n", "letters, digits"),
        (b"\xff\xfe" * 20, "no text"),
        (f"use {USE}\n" + "# \n" * 2**15, "no file of tokens"),
    ],
)
def test_a_file_that_is_not_written_as_it_should_be_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(TokenFileError, match=said) as refused:
        load_tokens(written(tmp_path, text), {})
    assert USE not in str(refused.value) and "short" not in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path):
        with pytest.raises(TokenFileError):
            load_tokens(file, {})


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(TokenFileError, match="is no file"):
        load_tokens(tmp_path / "pipe", {})


def test_a_token_in_both_places_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="NARROWBOAT_TOKEN"):
        load_tokens(written(tmp_path, f"admin {USE}\n"), {"NARROWBOAT_TOKEN": USE})


@pytest.mark.parametrize("sent", [None, b"", b"Bearer", b"Bearer ", b"Basic " + USE.encode(), USE.encode(), b"\xff"])
def test_what_is_no_known_token_is_unauthorized(sent: bytes | None) -> None:
    with pytest.raises(UnauthorizedError):
        may(Tokens([(USE, "use")]), sent, "use")


@pytest.mark.parametrize("sent", [USE[:-1], USE + "u", USE.upper(), "u" * 15 + "v"])
def test_a_token_that_is_nearly_one_is_none(sent: str) -> None:
    with pytest.raises(UnauthorizedError):
        may(Tokens([(USE, "use")]), f"Bearer {sent}".encode(), "use")


def test_every_known_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens([(letter * 16, "use") for letter in "abcd"])
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def spy(known: Any, given: Any) -> bool:
        compared.append((known, given))
        return real(known, given)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    for sent, found in ((b"a" * 16, True), (b"d" * 16, True), (b"none of them", False)):
        compared.clear()
        assert (tokens.find(sent) is not None) is found
        assert len(compared) == 4  # the first match does not end it
        assert all(len(known) == len(given) == 32 for known, given in compared)  # digests, not tokens


def test_tokens_are_not_kept() -> None:
    tokens = Tokens([(ADMIN, "admin")])
    assert ADMIN.encode() not in pickle.dumps(vars(tokens))
    assert ADMIN not in repr(tokens.find(ADMIN.encode()))
