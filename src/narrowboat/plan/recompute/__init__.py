"""What to keep, recompute or spill between a step's forward and its backward; pure arithmetic, no torch."""

from narrowboat.plan.recompute.chain import Chain, Option, Unit
from narrowboat.plan.recompute.schedule import Item, Kept, Schedule, Segment, evaluate
from narrowboat.plan.recompute.table import Table, frontier, solve

__all__ = ["Chain", "Item", "Kept", "Option", "Schedule", "Segment", "Table", "Unit", "evaluate", "frontier", "solve"]
