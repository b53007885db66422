"""Load decides how many nodes run a best-effort task, with hysteresis."""

from __future__ import annotations

from narrowboat.cluster.scale import Demand


def looks(demand: Demand, under_way: int, replicas: int, most: int, begin: float, seconds: float) -> list[int]:
    return [demand.look(begin + k / 2, under_way, replicas, most) for k in range(int(seconds * 2))]


def test_a_queue_that_stays_asks_for_one_more_node_at_a_time() -> None:
    said = looks(Demand(), 8, 1, 3, 0.0, 4.0)
    assert sum(said) == 1 and said[0] == 0


def test_a_short_burst_asks_for_nothing() -> None:
    demand = Demand()
    assert not any(looks(demand, 20, 1, 3, 0.0, 1.0))
    assert not any(looks(demand, 0, 1, 3, 1.0, 20.0))


def test_no_more_nodes_than_there_are() -> None:
    assert not any(looks(Demand(), 50, 3, 3, 0.0, 60.0))


def test_idle_replicas_are_given_back_late_and_the_last_one_never() -> None:
    demand = Demand()
    said = looks(demand, 0, 2, 3, 0.0, 40.0)
    assert sum(said) == -1 and not any(said[:59])
    assert not any(looks(Demand(), 0, 1, 3, 0.0, 100.0))


def test_a_load_between_the_two_marks_changes_nothing() -> None:
    assert not any(looks(Demand(), 3, 2, 3, 0.0, 100.0))
