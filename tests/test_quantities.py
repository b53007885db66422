"""Bytes and durations: what a person writes is read, what cannot be one is refused, and what is printed reads back."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.errors import QuantityError, UsageError
from narrowboat.quantities import format_apart, format_bytes, format_seconds, parse_bytes, parse_seconds

BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        ("300MiB", 300 << 20),
        ("300MB", 300 * 10**6),
        ("1.5GB", 1_500_000_000),
        (" 2 gib ", 2 << 30),
        (".5KiB", 512),
        ("7.", 7),
        ("4096", 4096),
        (4096, 4096),
        (4e6, 4_000_000),
        (2**70, 2**70),
    ],
)
def test_sizes_as_people_write_them(written: Any, nbytes: int) -> None:
    assert parse_bytes(written) == nbytes
    assert type(parse_bytes(written)) is int


@given(st.integers(1, 10**6), st.sampled_from(sorted(BYTES)), st.sampled_from(["", " ", "  "]), st.booleans())
def test_units_in_any_case_with_or_without_a_space(number: int, unit: str, space: str, upper: bool) -> None:
    written = f"{number}{space}{unit.upper() if upper else unit.lower()}"
    assert parse_bytes(written) == number * BYTES[unit]


@pytest.mark.parametrize(
    "value",
    [
        "12 apples",
        "",
        "  ",
        "MiB",
        "-1",
        "-3MiB",
        "1e9",
        "1_000",
        "0",
        "0.2B",
        "1.2.3MB",
        "0x10",
        "inf",
        "nan",
        "٣MiB",
    ],
)
def test_what_is_no_size_is_refused_with_an_example_of_one(value: str) -> None:
    with pytest.raises(QuantityError, match="limit"):
        parse_bytes(value, what="limit")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, 0.5, -1, True, False, None, [], b"3MB", 1 + 2j])
def test_numbers_that_are_no_size_are_refused(value: Any) -> None:
    with pytest.raises(UsageError):
        parse_bytes(value)


def test_an_integer_of_numpy_is_an_integer() -> None:
    numpy = pytest.importorskip("numpy")
    assert parse_bytes(numpy.int64(4096)) == 4096
    assert type(parse_bytes(numpy.int64(4096))) is int
    assert parse_bytes(numpy.float64(4096.0)) == 4096


@given(st.integers(0, 2**60))
def test_formatted_sizes_read_back_within_half_a_percent(nbytes: int) -> None:
    text = format_bytes(nbytes)
    number, unit = text.split(" ")
    assert len(number.replace(".", "")) <= 4 or unit == "TiB"
    if nbytes:
        assert parse_bytes(text) == pytest.approx(nbytes, rel=0.0051)
    assert format_bytes(-nbytes - 1) == "-" + format_bytes(nbytes + 1)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (300 << 20, "300 MiB")],
)
def test_sizes_are_printed_with_three_digits(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (2 << 20, 1 << 20, ("2.00 MiB", "1.00 MiB")),
        (1 << 20, 1 << 20, ("1.00 MiB", "1.00 MiB")),
        (1_761_608, 1_761_607, ("1.68 MiB (1,761,608 bytes)", "1.68 MiB (1,761,607 bytes)")),
    ],
)
def test_two_sizes_that_differ_never_look_the_same(first: int, second: int, told: tuple[str, str]) -> None:
    assert format_apart(first, second) == told


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("33ms", 0.033),
        ("5 us", 5e-6),
        ("5µs", 5e-6),
        ("2", 2.0),
        (2, 2.0),
        (0, 0.0),
        ("1.5 min", 90.0),
        ("1h", 3600.0),
    ],
)
def test_durations_as_people_write_them(written: Any, seconds: float) -> None:
    assert parse_seconds(written) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["33 apples", "", "-1s", -1, float("nan"), float("inf"), "ms", None, True, [3]])
def test_what_is_no_duration_is_refused(value: Any) -> None:
    with pytest.raises(QuantityError, match="period"):
        parse_seconds(value, what="period")


@given(st.floats(1e-9, 1e5))
def test_formatted_durations_read_back(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == pytest.approx(seconds, rel=0.0051)


def test_durations_are_printed_with_a_fitting_unit() -> None:
    assert [format_seconds(s) for s in (0.0123, 5e-6, 3e-8, 2.5, 1234.5)] == [
        "12.3 ms",
        "5 us",
        "30 ns",
        "2.5 s",
        "1234 s",
    ]
    assert not math.isnan(parse_seconds(format_seconds(0)))
