"""Weights on storage during training: stand-ins that stay, the window they take turns in, and what is trained."""

from narrowboat.train.weights.stored import StoredParameters
from narrowboat.train.weights.training import TrainingWeights

__all__ = ["StoredParameters", "TrainingWeights"]
