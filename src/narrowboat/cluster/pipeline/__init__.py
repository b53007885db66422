"""A model larger than any node: its layers over several nodes as pipeline stages, each streaming its own part."""

from narrowboat.cluster.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
