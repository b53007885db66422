"""A model split over several nodes: where to cut it, and how long inputs take through its stages. No torch."""

from narrowboat.plan.pipeline.choose import OBJECTIVES, Split, split
from narrowboat.plan.pipeline.model import Chain, Link, Node, Piece
from narrowboat.plan.pipeline.recurrence import Flow, Hop, StageTime, flow

__all__ = ["OBJECTIVES", "Chain", "Flow", "Hop", "Link", "Node", "Piece", "Split", "StageTime", "flow", "split"]
