"""Optimizer state and gradients outside memory: kept on storage, stepped bucket by bucket."""

from narrowboat.train.state.bucketed import BucketedOptimizer
from narrowboat.train.state.buckets import BucketFile
from narrowboat.train.state.gradients import GradientStore
from narrowboat.train.state.in_backward import InBackward
from narrowboat.train.state.layout import record_bytes
from narrowboat.train.state.optimizer import StoredOptimizer
from narrowboat.train.state.predict import gradient_bytes, state_bytes

__all__ = [
    "BucketFile",
    "BucketedOptimizer",
    "GradientStore",
    "InBackward",
    "StoredOptimizer",
    "gradient_bytes",
    "record_bytes",
    "state_bytes",
]
