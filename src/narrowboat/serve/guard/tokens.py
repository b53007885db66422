"""Bearer tokens: who may ask at all, and who may change what runs."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from narrowboat.errors import ForbiddenError, TokenFileError, UnauthorizedError
from narrowboat.serve.guard.files import read_file
from narrowboat.serve.guard.rights import Right

SHORTEST = 16
ENVIRONMENT: dict[str, Literal["use", "admin"]] = {"NARROWBOAT_TOKEN": "use", "NARROWBOAT_ADMIN_TOKEN": "admin"}
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")  # what a header may carry after "Bearer": RFC 6750
_HOW = "write one a line, as `use TOKEN` or `admin TOKEN`; `#` begins a comment"


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        name: the first characters of the token's digest, which say nothing of the token; "" without one.
        admin: may change what runs.
    """

    name: str
    admin: bool


ANYONE = Caller("", admin=True)
_NOBODY = Caller("", admin=False)


class Tokens:
    """The tokens that are known, as digests. Without any, everyone has all rights.

    Args:
        tokens: (token, its right).
    """

    def __init__(self, tokens: Iterable[tuple[str, Literal["use", "admin"]]] = ()) -> None:
        digests = [(hashlib.sha256(token.encode()).digest(), right) for token, right in tokens]
        self._known = [(digest, Caller(digest.hex()[:8], right == "admin")) for digest, right in digests]

    def __bool__(self) -> bool:
        return bool(self._known)

    def find(self, token: bytes) -> Caller | None:
        """Whose token this is. Takes the same time whichever it is, and whether it is one or not."""
        digest, found = hashlib.sha256(token).digest(), None
        for known, caller in self._known:
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def identify(self, authorization: bytes | None) -> Caller | None:
        """Who asks; None if that cannot be known.

        Args:
            authorization: what the header of that name says; None if there is none.
        """
        if not self._known:
            return ANYONE
        scheme, _, token = (authorization or b"").partition(b" ")
        return self.find(token.strip()) if scheme.lower() == b"bearer" else None

    def authorise(self, caller: Caller | None, right: Right) -> Caller:
        """Let whoever :meth:`identify` found have a right.

        Raises:
            UnauthorizedError: nobody, and it is no right that everyone has.
            ForbiddenError: they lack it.
        """
        if right == "open":
            return caller or _NOBODY
        if caller is None:
            raise UnauthorizedError("a bearer token that is known here is needed: `Authorization: Bearer TOKEN`")
        if right == "admin" and not caller.admin:
            raise ForbiddenError("this token may use tasks, not change them: a token with the right `admin` is needed")
        return caller


def load_tokens(file: Path | None, environment: MutableMapping[str, str] | None = None) -> Tokens:
    """The tokens of a file and of ``NARROWBOAT_TOKEN`` and ``NARROWBOAT_ADMIN_TOKEN``.

    Args:
        file: with one token a line; None for none.
        environment: the process's own by default. The tokens are taken out of it, so that no child inherits them.

    Raises:
        TokenFileError: a file that others could read or write, or that is not written as it should be.
    """
    environment = os.environ if environment is None else environment
    found: list[tuple[str, str, Literal["use", "admin"]]] = []
    for variable, right in ENVIRONMENT.items():
        token = environment.pop(variable, None)
        if token is not None:
            found.append((variable, token, right))
    if file is not None:
        found.extend(_read(file))
    seen: dict[str, str] = {}
    for where, token, _ in found:
        if len(token) < SHORTEST:
            raise TokenFileError(
                f"{where}: a token of {len(token)} characters is too easy to guess: {SHORTEST} at least "
                "(`openssl rand -hex 32` makes a good one)"
            )
        if not _TOKEN.fullmatch(token):
            raise TokenFileError(f"{where}: a token is made of letters, digits and -._~+/ only; = may end it")
        if token in seen:
            raise TokenFileError(f"{where}: the same token as {seen[token]}; each has one right and one place")
        seen[token] = where
    return Tokens((token, right) for _, token, right in found)


def _read(file: Path) -> list[tuple[str, str, Literal["use", "admin"]]]:
    try:
        lines = read_file(file, "file of tokens", TokenFileError, private=True).decode().splitlines()
    except UnicodeDecodeError as error:
        raise TokenFileError(f"{file}: is no text: {_HOW}") from error
    found: list[tuple[str, str, Literal["use", "admin"]]] = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in ("use", "admin"):
            raise TokenFileError(f"{file}, line {number}: not written as it should be: {_HOW}")
        found.append((f"{file}, line {number}", words[1], "admin" if words[0] == "admin" else "use"))
    if not found:
        raise TokenFileError(f"{file}: holds no token: {_HOW}")
    return found
