"""From tokens, one by one, to text that may be sent: whole characters, and nothing that a stop string could begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 6  # tokens before the first that may change how it is written, such as the space in front of it
_PATIENCE = 8  # tokens after which a character that is still not whole is taken for broken
_BROKEN = "�"


class Characters:
    """Whole characters out of tokens.

    Args:
        decode: tokens to text.
        before: tokens that came before the first one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(before[-_CONTEXT:])
        self._said = len(self._tokens)  # tokens whose text is out

    def add(self, token: int) -> str:
        """One more; the text that is certain now and was not before."""
        self._tokens.append(token)
        whole = len(self._tokens) - self._said > _PATIENCE
        return self._more(whole)

    def end(self) -> str:
        """Nothing follows: what was held back."""
        return self._more(True)

    def _more(self, whole: bool) -> str:
        known = self._decode(self._tokens[: self._said])
        now = self._decode(self._tokens)
        if len(now) <= len(known) or (now.endswith(_BROKEN) and not whole):
            return ""
        # What came last stays as context for what follows.
        self._tokens = self._tokens[self._said :]
        self._said = len(self._tokens)
        return now[len(known) :]


class Stops:
    """Text up to the first of some strings.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """More text; what of it may be sent now, and whether a stop string has come."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            said, self._held = self._held[: min(found)], ""
            return said, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        said, self._held = self._held[:cut], self._held[cut:]
        return said, False

    def end(self) -> str:
        """Nothing follows: what was held back."""
        said, self._held = self._held, ""
        return said


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of ``text`` with which ``stop`` begins; fewer than it has."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
