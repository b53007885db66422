"""Verdicts follow from measurements: made-up ones, missing ones, broken ones."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")

from narrowboat.tasks.record import JobRecord, Record, Segment
from papers_kit.adapt_checks import order_told
from papers_kit.rules import in_order, on_time, one_at_a_time, overlapped, runs, swaps, victims
from papers_kit.set_checks import OURS
from papers_kit.set_checks import told_of as shares_told
from papers_kit.stream_checks import told_of as cells_told
from papers_kit.train_checks import least_told
from papers_kit.verdicts import Kind, also, at_least, at_most, cannot_without, holds, judged, supported


@pytest.mark.parametrize(
    ("value", "kind"), [(1.0, Kind.AGREES), (1.09, Kind.AGREES), (1.2, Kind.WORSE), (0.8, Kind.BETTER)]
)
def test_a_number_that_should_be_small(value: float, kind: Kind) -> None:
    found = at_most("x", 1.0, tell="{x:.2f} x")({"x": value})
    assert (found.kind, found.here) == (kind, f"{value:.2f} x")


@pytest.mark.parametrize(
    ("value", "kind"), [(20, Kind.AGREES), (19, Kind.AGREES), (7, Kind.WORSE), (float("inf"), Kind.BETTER)]
)
def test_a_number_that_should_be_large(value: float, kind: Kind) -> None:
    assert at_least("x", 20, tell="{x}")({"x": value}).kind is kind


def test_what_is_no_number_is_a_failed_check() -> None:
    assert at_most("x", 1, tell="{x}")({"x": float("nan")}).kind is Kind.FAILED


def test_a_property_that_does_not_hold_is_a_failed_check_and_says_which() -> None:
    rule = holds("same_bits", "direct_reads", tell="{n} cells")
    assert rule({"same_bits": True, "direct_reads": True, "n": 3}).kind is Kind.AGREES
    found = rule({"same_bits": False, "direct_reads": True, "n": 3})
    assert (found.kind, found.here, found.why) == (Kind.FAILED, "3 cells", "does not hold: same bits")


def test_a_number_does_not_excuse_a_broken_property() -> None:
    rule = also("within", rule=at_most("x", 1, tell="{x}"))
    assert rule({"x": 0.5, "within": True}).kind is Kind.BETTER
    assert rule({"x": 0.5, "within": False}).kind is Kind.FAILED


def test_what_the_papers_can_and_we_cannot_is_worse_not_failed() -> None:
    rule = supported("second_order", tell="{said}", otherwise="refused")
    assert rule({"second_order": False, "said": "no"}).kind is Kind.WORSE
    assert rule({"second_order": True, "said": "yes"}).kind is Kind.AGREES


def test_what_the_machine_lacks_cannot_be_measured() -> None:
    rule = cannot_without("gpu", "no GPU here", holds("fast", tell="fast"))
    assert rule({"gpu": False}).kind is Kind.CANNOT
    assert rule({"gpu": True, "fast": True}).kind is Kind.AGREES
    unmeasured = cannot_without("gpu", "no GPU here")({"gpu": True})
    assert unmeasured.kind is Kind.CANNOT and "does not measure it" in unmeasured.why


@pytest.mark.parametrize(
    "rule",
    [
        holds("a", tell="{b}"),
        at_most("a", 1, tell="{b}"),
        supported("a", tell="{b}", otherwise=""),
        cannot_without("a", ""),
        also("a", rule=at_least("b", 1, tell="{b}")),
    ],
)
def test_what_was_not_measured_is_a_failed_check_whatever_the_rule(rule: object) -> None:
    for measured in ({}, {"b": None, "c": 1}):
        assert judged(rule, measured).kind is Kind.FAILED  # type: ignore[arg-type]


def test_a_failed_run_shows_its_reason_and_one_not_asked_for_is_not_run() -> None:
    rule = holds("a", tell="a")
    found = judged(rule, None, "stopped after 60 s")
    assert (found.kind, found.why) == (Kind.FAILED, "stopped after 60 s")
    assert judged(rule, None, allowed=False).kind is Kind.NOT_RUN


def cell(**other: object) -> dict[str, object]:
    return {
        "model": "m", "ratio": 2.32, "asked": 2.32, "latency": 1.05, "plain_s": 1.0, "over": -5, "saved": 0.5,
        "bits": True, "difference": 0.0, "cached": 0, "direct": True, "copied": 0, "bandwidth": 1e9, "tiled": False,
        **other,
    }  # fmt: skip


def test_tiles_may_round_and_everything_else_has_to_have_the_same_bits() -> None:
    good = cells_told([cell(), cell(tiled=True, bits=False, difference=5e-7)])
    assert good["same_bits"] and good["tiled_close"] and good["within_budget"]
    bad = cells_told([cell(bits=False), cell(tiled=True, bits=False, difference=0.1), cell(over=10)])
    assert not bad["same_bits"] and not bad["tiled_close"] and not bad["within_budget"]


def test_gains_are_over_the_best_of_the_others() -> None:
    shares = {OURS: 1.0, "RT-Swap's rules": 0.4, "whole models": 0.5, "no swapping": 0.0}
    told = shares_told(shares)
    assert told["gain"] == pytest.approx(1.0) and told["best_rival"] == "whole models"
    assert told["rules_gain"] == pytest.approx(-0.2)
    assert shares_told({**shares, "RT-Swap's rules": 0.0, "whole models": 0.0})["gain"] == float("inf")


def test_a_technique_helps_only_if_the_smallest_budget_falls() -> None:
    told = least_told({"none": 100, "recompute": 60, "reduce": 100, "fuse": 90, "low_memory": 110})
    assert (told["recompute_helps"], told["reduction_helps"]) == (True, False)
    assert (told["fusion_helps"], told["operators_help"]) == (True, False)


def record() -> Record:
    """Two tasks of 10 bytes in 10: a runs while b is out, gives way, and comes back."""
    found = Record()
    found.jobs = [JobRecord("a", 0, 0, 100_000, 0, 10_000), JobRecord("b", 0, 0, 200_000, 0, 40_000)]
    found.segments = [
        Segment("load", "swap_in", "a", 0, 0, 0, 2_000, 10),
        Segment("compute", "run", "a", 0, 0, 2_000, 10_000),
        Segment("load", "swap_out", "a", -1, 0, 10_000, 12_000, 6),
        Segment("load", "swap_in", "b", 0, 0, 12_000, 14_000, 10),
        Segment("compute", "run", "b", 0, 0, 14_000, 40_000),
    ]
    return found


def test_rt_swaps_rules_are_seen_in_a_record() -> None:
    found = record()
    assert one_at_a_time(swaps(found)) and one_at_a_time(runs(found))
    assert overlapped(found) == 0
    assert in_order(found) == (2, 0, 0)
    assert victims(found, {"a": 10, "b": 10}) == (1, 0, 0)
    assert on_time(found, {"a": 100_000, "b": 200_000})


def test_broken_rules_are_seen_too() -> None:
    found = record()
    found.segments[2] = Segment("load", "swap_out", "b", -1, 0, 3_000, 12_500, 6)  # and b comes next
    assert not one_at_a_time(swaps(found))
    assert overlapped(found) == 7_000
    assert victims(found, {"a": 10, "b": 10})[2] == 1
    found.jobs[1] = JobRecord("b", 0, 0, 50_000, 0, 40_000)  # more urgent, and waits
    found.segments[0] = Segment("load", "swap_in", "b", 0, 0, 0, 1_000, 10)
    found.segments[1] = Segment("compute", "run", "a", 0, 0, 5_000, 10_000)
    assert in_order(found)[2] == 1
    found.jobs[0] = JobRecord("a", 1, 99_000, 200_000)
    assert not on_time(found, {"a": 100_000, "b": 200_000})


def test_what_comes_first_on_the_way_down_is_seen() -> None:
    def row(parts: int, schedule: str, slowdown: float) -> dict[str, object]:
        return {"parts": parts, "schedule": schedule, "slowdown": slowdown}

    ours = [row(1, "8 kept", 1.0), row(2, "8 kept", 1.1), row(4, "3 kept, 5 recomputed", 1.3), None]
    told = order_told(ours, [row(1, "8 kept", 1.0), row(2, "8 kept", 1.1), row(16, "8 kept", 2.6), None])
    assert told["accumulates_first"] and told["both_are_used"]
    assert told["alone_over_ours"] == pytest.approx(2.0) and told["deeper"] == 0
    told = order_told([row(1, "2 recomputed", 1.2)], [None])
    assert told["first"] == "recomputing" and told["deeper"] == 1
