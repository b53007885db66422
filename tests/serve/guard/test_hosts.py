"""Names and addresses: nobody else is let in by mistake, and no page of another site."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from narrowboat.errors import BadRequestError, ForbiddenError, InsecureAddressError, UsageError
from narrowboat.serve.guard.hosts import Hosts, is_loopback, require_safe, resolve

LOCAL = Hosts("127.0.0.1", "127.0.0.1", 8000, tls=False)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_needs_neither_tokens_nor_tls(address: str) -> None:
    assert is_loopback(address)
    require_safe(address, address, tokens=False, tls=False)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.4", "10.0.0.1", "fe80::1%eth0", "::ffff:10.0.0.1"])
@pytest.mark.parametrize(
    ("tokens", "tls", "missing"), [(False, False, "tokens.*TLS"), (True, False, "TLS"), (False, True, "tokens")]
)
def test_any_other_address_needs_both(address: str, tokens: bool, tls: bool, missing: str) -> None:
    with pytest.raises(InsecureAddressError, match=missing):
        require_safe(address, address, tokens=tokens, tls=tls)
    require_safe(address, address, tokens=True, tls=True)


def test_a_name_counts_as_what_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    def means(*addresses: str) -> None:
        def told(host: str, port: int, **_: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", told)

    means("192.0.2.7")
    _, address = resolve("localhost.example", 8000)
    with pytest.raises(InsecureAddressError):
        require_safe("localhost.example", address, tokens=False, tls=False)
    means("127.0.0.1", "192.0.2.7")
    with pytest.raises(InsecureAddressError, match="name the one"):
        resolve("both.example", 8000)


def test_a_name_without_an_address_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="no such address"):
        resolve("300.300.300.300", 8000)


@pytest.mark.parametrize(
    "host",
    [b"127.0.0.1:8000", b"localhost:8000", b"LOCALHOST:8000", b"[::1]:8000", b"127.1.2.3:8000", b"localhost.:8000"],
)
def test_our_names_are_let_in(host: bytes) -> None:
    LOCAL.check(host)


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"evil.example:8000",
        b"localhost",
        b"localhost:80",
        b"localhost:8001",
        b"localhost.evil.example:8000",
        b"127.0.0.1.evil.example:8000",
        b"evil.example@localhost:8000",
        b"localhost:8000@evil.example",
        b"localhost:8000/x",
        b"localhost:8000#",
        b"localhost:8000?",
        b"localhost:port",
        b"localhost:99999",
        b"10.0.0.1:8000",
        b"[::2]:8000",
        b"[::1:8000",
        b"\xff:8000",
        b"",
        b" ",
    ],
)
def test_other_names_are_forbidden(host: bytes) -> None:
    with pytest.raises(ForbiddenError):
        LOCAL.check(host)
    with pytest.raises(ForbiddenError):  # what is remembered of it is the same
        LOCAL.check(host)


def test_a_request_without_a_host_is_a_bad_one() -> None:
    with pytest.raises(BadRequestError):
        LOCAL.check(None)


def test_the_configured_name_is_ours_and_ports_have_their_usual_meaning() -> None:
    secure = Hosts("boat.example", "192.0.2.7", 443, tls=True)
    secure.check(b"boat.example")
    secure.check(b"boat.example:443")
    secure.check(b"192.0.2.7")
    with pytest.raises(ForbiddenError):
        secure.check(b"other.example")


def test_behind_a_wildcard_address_any_name_is_ours() -> None:
    Hosts("0.0.0.0", "0.0.0.0", 8000, tls=True).check(b"boat.example:9443")


def test_only_our_own_page_may_ask() -> None:
    LOCAL.check_origin(b"localhost:8000", None, None)
    LOCAL.check_origin(b"localhost:8000", b"http://localhost:8000", b"same-origin")
    LOCAL.check_origin(b"localhost:8000", None, b"none")
    for origin in (
        b"null",
        b"http://evil.example",
        b"https://localhost:8000",
        b"http://localhost:3000",
        b"http://127.0.0.1:8000",
        b"http://localhost:8000.evil.example",
        b"",
    ):
        with pytest.raises(ForbiddenError):
            LOCAL.check_origin(b"localhost:8000", origin, None)
    for site in (b"cross-site", b"same-site"):
        with pytest.raises(ForbiddenError):
            LOCAL.check_origin(b"localhost:8000", None, site)
