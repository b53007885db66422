"""Pure decisions, no torch: timing, residency, layout, and the plan made of them."""

from narrowboat.plan.make import make_plan, minimum_budget
from narrowboat.plan.model import Block, Machine, Workload
from narrowboat.plan.result import Plan
from narrowboat.plan.timing import Timing, simulate

__all__ = ["Block", "Machine", "Plan", "Timing", "Workload", "make_plan", "minimum_budget", "simulate"]
