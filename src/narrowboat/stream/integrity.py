"""Are the bytes that came in the ones that were packed? Checked against the digests before they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from narrowboat.arena.slab import Slab
from narrowboat.errors import DigestError, UsageError
from narrowboat.stream.blocks import BlockState

MODES = ("off", "load", "always")
_EVERY = 16  # of the later swap-ins, one in so many is checked


class Integrity:
    """Checks blocks as they come in.

    Args:
        mode: ``"load"`` checks every weight the first time it comes in; ``"always"`` then also one later swap-in in
            sixteen, each block in its turn.
        digests: sha256 (hex) by tensor name, of a packed file.
        path: the weights file, for the message.

    Raises:
        UsageError: the file has no digests.
    """

    def __init__(self, mode: str, digests: Mapping[str, str], path: object) -> None:
        if not digests:
            raise UsageError(
                f"verify={mode!r} needs digests, and {path} has none: pack it (narrowboat pack), or use verify='off'"
            )
        self._sampled = mode == "always"
        self._digests = digests
        self._seen: dict[int, int] = {}  # block -> swap-ins since its check
        self.checked = 0  # bytes

    def check(self, block: BlockState, slab: Slab) -> None:
        """Compare a block that has just come in with its digests, if it is its turn.

        Raises:
            DigestError: a tensor's bytes are not those that were packed; names it and the file.
        """
        since = self._seen.get(block.index)
        due = since is None or (self._sampled and since + 1 >= _EVERY)
        # Blocks are staggered, or all would be due in the same pass.
        self._seen[block.index] = (block.index % _EVERY if since is None else 0) if due else (since or 0) + 1
        if not due:
            return
        where, base = (block.private, 0) if block.private is not None else (slab, block.offset or 0)
        for weight, place in zip(block.weights, block.places, strict=True):
            entry = weight.entry
            want = self._digests.get(entry.name)
            if want is None or not entry.nbytes:
                continue
            with where.bytes_at(base + place, entry.nbytes) as data:
                found = hashlib.sha256(data).hexdigest()
            self.checked += entry.nbytes
            if found != want:
                del self._seen[block.index]
                raise DigestError(
                    f"{entry.file}: the bytes read for tensor {entry.name!r} are not the ones that were packed; "
                    "the file or its storage is damaged: pack it again from the original"
                )
