"""Schedulability, response times and memory of a set of tasks: arithmetic on integers, without torch."""
