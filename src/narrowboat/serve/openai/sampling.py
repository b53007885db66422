"""Which token follows: arithmetic on one row of logits, the same for the same seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_FEW = 1024  # most probable tokens among which `top_p` is looked for first


@dataclass(frozen=True)
class Sampling:
    """How to choose.

    Attributes:
        temperature: 0 is the most probable token.
        top_p: among the most probable tokens that have this much together.
        top_k: among so many; 0 for all.
        seed: of the draws; None for another one each time.
        presence: taken off the logits of tokens that have come.
        frequency: taken off for each time.
        bias: added to tokens' logits.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A token and what the model gave it.

    Attributes:
        token: its number.
        logprob: natural logarithm of its probability by the model's own logits.
    """

    token: int
    logprob: float


class Sampler:
    """Chooses the tokens of one text.

    Args:
        sampling: how.
        stream: number of the text in its request: texts of one seed differ by it.
    """

    def __init__(self, sampling: Sampling, stream: int = 0) -> None:
        self._how = sampling
        self._counts: dict[int, int] = {}
        entropy = None if sampling.seed is None else [sampling.seed % (1 << 64), stream]
        self._draws = np.random.default_rng(entropy)

    def take(self, logits: np.ndarray[Any, Any]) -> int:
        """The next token of logits [vocabulary]; it counts for the penalties of those that follow."""
        scores = self._adjusted(logits)
        token = int(scores.argmax()) if self._how.temperature == 0 else self._draw(scores)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _adjusted(self, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        how = self._how
        scores = logits.astype(np.float64)
        for token, added in how.bias.items():
            scores[token] += added
        if how.presence or how.frequency:
            for token, count in self._counts.items():
                scores[token] -= how.presence + how.frequency * count
        return scores

    def _draw(self, scores: np.ndarray[Any, Any]) -> int:
        how = self._how
        with np.errstate(over="ignore"):  # a tiny temperature makes all but the best minus infinity, as it should
            scores = (scores - scores.max()) / how.temperature
        tokens = _best(scores, how.top_k) if 0 < how.top_k < len(scores) else np.arange(len(scores))
        chances = np.exp(scores[tokens])
        if how.top_p < 1:
            kept = _nucleus(chances, how.top_p)
            tokens, chances = tokens[kept], chances[kept]
        reach = np.cumsum(chances)
        place = int(np.searchsorted(reach, self._draws.random() * reach[-1], side="right"))
        return int(tokens[min(place, len(tokens) - 1)])


def _best(scores: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Places of the largest, in the order of places, so that draws do not depend on how they were found."""
    return np.sort(np.argpartition(scores, -count)[-count:])


def _nucleus(chances: np.ndarray[Any, Any], share: float) -> np.ndarray[Any, Any]:
    """Places of the fewest chances that have ``share`` of all together, in order; one at least."""
    wanted = share * chances.sum()
    few = np.argpartition(chances, -_FEW)[-_FEW:] if len(chances) > _FEW else np.arange(len(chances))
    if chances[few].sum() < wanted:
        few = np.arange(len(chances))
    order = few[np.argsort(-chances[few], kind="stable")]
    count = int(np.searchsorted(np.cumsum(chances[order]), wanted)) + 1
    return np.sort(order[:count])


def scored(logits: np.ndarray[Any, Any], token: int, best: int) -> tuple[Scored, list[Scored]]:
    """What the model itself gave ``token``, and its ``best`` most probable ones, before anything is adjusted."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    top = _best(values, min(best, len(values))) if best else np.empty(0, int)
    ordered = sorted(top.tolist(), key=lambda one: (-values[one], one))
    return Scored(token, float(values[token])), [Scored(one, float(values[one])) for one in ordered]
