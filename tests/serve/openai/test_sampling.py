"""Which token follows."""

from __future__ import annotations

import numpy as np
import pytest

from narrowboat.serve.openai.sampling import Sampler, Sampling, scored

LOGITS = np.array([0.0, 3.0, 1.0, 2.0, -np.inf], np.float32)


def draws(logits: np.ndarray, count: int = 4000, **how: float) -> np.ndarray:
    """How often each token came, as shares."""
    sampler = Sampler(Sampling(seed=1, **how))  # type: ignore[arg-type]
    taken = [sampler.take(logits) for _ in range(count)]
    return np.bincount(taken, minlength=len(logits)) / count


def softmax(logits: np.ndarray) -> np.ndarray:
    chances = np.exp(logits - logits.max())
    return chances / chances.sum()


def test_no_temperature_takes_the_most_probable() -> None:
    assert Sampler(Sampling(temperature=0)).take(LOGITS) == 1
    assert Sampler(Sampling(temperature=0)).take(np.array([1.0, 7.0, 7.0])) == 1  # the first of equals


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    assert np.abs(draws(LOGITS, temperature=temperature) - softmax(LOGITS / temperature)).max() < 0.03


def test_a_tiny_temperature_takes_the_most_probable() -> None:
    assert draws(LOGITS, 50, temperature=1e-300)[1] == 1


def test_top_k_and_top_p_leave_the_others_out() -> None:
    assert (draws(LOGITS, top_k=2) > 0).tolist() == [False, True, False, True, False]
    chances = softmax(LOGITS)
    assert (draws(LOGITS, top_p=float(chances[1]) - 0.01) > 0).tolist() == [False, True, False, False, False]
    assert (draws(LOGITS, top_p=float(chances[1]) + 0.01) > 0).tolist() == [False, True, False, True, False]
    assert (draws(LOGITS, top_p=0) > 0).sum() == 1
    both = draws(LOGITS, top_k=3, top_p=0.99)  # of what top_k leaves
    assert both[0] == 0 and both[2] > 0


def test_the_nucleus_of_a_large_vocabulary_is_the_same_as_of_a_sorted_one() -> None:
    rng = np.random.default_rng(3)
    for scale in (0.01, 6.0):  # flat: more than the few that are looked at first; and steep
        logits = rng.normal(size=5000) * scale
        order = np.argsort(-softmax(logits), kind="stable")
        reach = np.cumsum(softmax(logits)[order])
        nucleus = set(order[: int(np.searchsorted(reach, 0.7)) + 1].tolist())
        sampler = Sampler(Sampling(seed=2, top_p=0.7))
        assert {sampler.take(logits) for _ in range(200)} <= nucleus


def test_the_same_seed_draws_the_same_and_texts_of_one_request_differ() -> None:
    flat = np.zeros(1000)
    runs = [[Sampler(Sampling(seed=s), n).take(flat)] for s, n in ((7, 0), (7, 0), (7, 1), (8, 0), (-1, 0))]
    assert runs[0] == runs[1]
    assert len({run[0] for run in runs}) == 4
    assert len({Sampler(Sampling()).take(flat) for _ in range(20)}) > 1


def test_penalties_are_taken_off_what_has_come() -> None:
    greedy = Sampler(Sampling(temperature=0, presence=1.5))
    assert [greedy.take(LOGITS) for _ in range(4)] == [1, 3, 1, 1]  # 3 -> 1.5; 2 -> 0.5; once is all
    often = Sampler(Sampling(temperature=0, frequency=0.75))
    assert [often.take(LOGITS) for _ in range(5)] == [1, 1, 3, 1, 3]
    reward = Sampler(Sampling(temperature=0, presence=-2))
    assert [reward.take(np.array([1.0, 0.9, 0.8])) for _ in range(3)] == [0, 0, 0]


def test_bias_is_added() -> None:
    assert Sampler(Sampling(temperature=0, bias={1: -100, 2: 1.5})).take(LOGITS) == 2
    assert LOGITS[1] == 3, "what is given stays as it is"


def test_log_probabilities_are_the_models_own() -> None:
    one, best = scored(LOGITS, 3, 2)
    with np.errstate(divide="ignore"):
        wanted = np.log(softmax(LOGITS.astype(float)))
    assert one.token == 3 and one.logprob == pytest.approx(wanted[3])
    assert [(b.token, pytest.approx(b.logprob)) for b in best] == [(1, wanted[1]), (3, wanted[3])]
    assert scored(LOGITS, 0, 0)[1] == [] and len(scored(LOGITS, 0, 99)[1]) == 5
