"""Runs tasks for real: one compute engine, one load engine, one budget, the policy's decisions at block boundaries."""
