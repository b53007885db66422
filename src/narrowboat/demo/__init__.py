"""Narrowboat beside what people use today: children that each run one model one way, and what they measured."""
