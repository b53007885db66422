"""Weights in memory: the slab, by-reference tensor views, stand-ins, and the ledger of who holds what."""

from narrowboat.arena.ledger import Ledger
from narrowboat.arena.slab import Slab
from narrowboat.arena.slot import Slot
from narrowboat.arena.standin import is_standin

__all__ = ["Ledger", "Slab", "Slot", "is_standin"]
