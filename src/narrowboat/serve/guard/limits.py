"""How much clients may ask at once and per second. Plain arithmetic: no event loop, no clock of its own."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

from narrowboat.errors import BeyondContractError, NotServingError
from narrowboat.serve.settings import Limits


def client_of(token: str, address: str | None) -> str:
    """By what a client is counted: its token, else its address; of IPv6 the network that one subscriber has."""
    if token:
        return token
    if address is None or ":" not in address:
        return address or ""
    parsed = ipaddress.IPv6Address(address.split("%", 1)[0])
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))


@dataclass(slots=True)
class _Client:
    tokens: float  # of its bucket: requests it may send now
    at: float  # when they were counted, in seconds
    active: int = 0


class Meter:
    """Counts requests under way, their bytes, and each client's rate.

    Args:
        limits: that are kept.

    Attributes:
        active: requests under way.
        held: bytes of request bodies that are held.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self.active = 0
        self.held = 0

    def __len__(self) -> int:
        return len(self._clients)

    def charge(self, name: str, now: float) -> None:
        """Take one request out of a client's bucket.

        Args:
            name: of the client.
            now: seconds of a clock that does not go back.

        Raises:
            BeyondContractError: it is empty; ``retry_after`` says when it no longer will be.
        """
        limits, client = self._limits, self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(float(limits.burst), now)
            self._forget()
        else:
            self._clients.move_to_end(name)
        client.tokens = min(limits.burst, client.tokens + (now - client.at) * limits.rate)
        client.at = now
        if client.tokens < 1:
            raise BeyondContractError(
                f"more than {limits.rate:g} requests per second; wait", retry_after=(1 - client.tokens) / limits.rate
            )
        client.tokens -= 1

    def enter(self, name: str, now: float) -> None:
        """One request more is under way; :meth:`leave` has to follow if this returns.

        Raises:
            BeyondContractError: the client has too many under way, or sends too many per second.
            NotServingError: all clients together have too many under way.
        """
        self.charge(name, now)
        client = self._clients[name]
        if client.active >= self._limits.requests_per_client:
            raise BeyondContractError(
                f"{client.active} requests of this client are under way already; wait for their answers", retry_after=1
            )
        if self.active >= self._limits.requests:
            raise NotServingError("too many requests are under way; try again", retry_after=1)
        client.active += 1
        self.active += 1

    def leave(self, name: str, held: int = 0) -> None:
        """A request has ended, and ``held`` bytes of its body are let go."""
        self._clients[name].active -= 1
        self.active -= 1
        self.held -= held

    def hold(self, nbytes: int) -> None:
        """So many bytes more of a body have come.

        Raises:
            NotServingError: all bodies together are too large; these bytes are not counted.
        """
        if self.held + nbytes > self._limits.held_bytes:
            raise NotServingError("too many request bodies are held at once; try again", retry_after=1)
        self.held += nbytes

    def _forget(self) -> None:
        """Forget the client that was silent longest, of those with nothing under way."""
        if len(self._clients) <= self._limits.clients:
            return
        for name, client in self._clients.items():  # as many are passed over as have requests under way, at most
            if not client.active:
                del self._clients[name]
                return
