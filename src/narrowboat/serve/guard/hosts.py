"""Where the gateway may be reached, and by which names: against web pages that talk to it through a browser."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from narrowboat.errors import BadRequestError, ForbiddenError, InsecureAddressError, UsageError


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """The family and the address to bind for a host's name.

    Raises:
        UsageError: it has none.
        InsecureAddressError: it has several, of which some are this machine's alone and some are not.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: no such address: {error}; 127.0.0.1 is this machine alone") from error
    addresses = [(family, str(address[0])) for family, _, _, _, address in found]
    kinds = {is_loopback(address) for _, address in addresses}
    if len(kinds) > 1:
        raise InsecureAddressError(f"--host {host} means {', '.join(a for _, a in addresses)}: name the one you mean")
    return min(addresses, key=lambda found: found[0] != socket.AF_INET)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a literal address."""
    parsed = ipaddress.ip_address(address.split("%", 1)[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def require_safe(host: str, address: str, *, tokens: bool, tls: bool) -> None:
    """Let only this machine in where there are no tokens or no TLS.

    Raises:
        InsecureAddressError: others could reach the address, and something is missing.
    """
    if is_loopback(address) or (tokens and tls):
        return
    missing = [
        *([] if tokens else ["bearer tokens (--tokens FILE, or NARROWBOAT_TOKEN and NARROWBOAT_ADMIN_TOKEN)"]),
        *([] if tls else ["TLS (--certificate FILE --key FILE)"]),
    ]
    raise InsecureAddressError(
        f"others can reach {host}, so that it needs {' and '.join(missing)}; --host 127.0.0.1 needs neither"
    )


class Hosts:
    """The names by which a browser may speak to us.

    A page of another site cannot read our answers, unless its name is made to mean our address (DNS rebinding): then
    it is the Host header that still has the foreign name. Where all names are let in (a wildcard address), tokens
    and TLS are there, and a page has neither our certificate nor the token.

    Args:
        host: that was configured.
        address: that it means.
        port: that is bound.
        tls: is spoken.
    """

    def __init__(self, host: str, address: str, port: int, *, tls: bool) -> None:
        self._scheme = "https" if tls else "http"
        self._default_port = 443 if tls else 80
        self._port = port
        self._any = ipaddress.ip_address(address.split("%", 1)[0]).is_unspecified
        self._names = {"localhost", host.lower(), address.lower()}
        # A few spellings make up nearly all requests.
        self._known: dict[bytes, bool] = {}

    def check(self, host: bytes | None) -> None:
        """Judge a Host header.

        Raises:
            BadRequestError: there is none.
            ForbiddenError: it names another host or port.
        """
        if host is None:
            raise BadRequestError("the header Host is missing")
        allowed = self._known.get(host)
        if allowed is None:
            allowed = self._is_ours(host.decode("latin-1"))
            if len(self._known) < 64:
                self._known[host] = allowed
        if not allowed:
            raise ForbiddenError(
                f"this gateway does not go by the name in the header Host: use localhost:{self._port} or its address"
            )

    def check_origin(self, host: bytes | None, origin: bytes | None, fetch_site: bytes | None) -> None:
        """Judge who had the browser ask, for a request that reads or changes something.

        Raises:
            ForbiddenError: a page of another site: not of the one that the Host header names.
        """
        ours = f"{self._scheme}://".encode() + (host or b"")
        if fetch_site in (b"cross-site", b"same-site") or (origin is not None and origin.lower() != ours.lower()):
            raise ForbiddenError("a page of another site may not ask this gateway")

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            port, name = parts.port, (parts.hostname or "").rstrip(".")
        except ValueError:
            return False
        if not name or parts.netloc != host or "@" in host:
            return False
        if self._any:  # another port may have been mapped to ours
            return True
        if (self._default_port if port is None else port) != self._port:
            return False
        if name in self._names:
            return True
        try:
            return is_loopback(name)
        except ValueError:
            return False
