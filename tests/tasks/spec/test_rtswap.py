"""RT-Swap's configuration lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from narrowboat.errors import TaskSpecError
from narrowboat.tasks.spec.rtswap import RtSwapLine, load_rtswap, parse_rtswap


def test_the_published_samples_are_read() -> None:
    assert parse_rtswap("5,500,2097152,1,0\n") == [RtSwapLine(5, 500, 2097152, (0,))]
    assert parse_rtswap("0,600,0\n", variant="darknet") == [RtSwapLine(0, 600, None, ())]
    assert parse_rtswap("1, 500, 64, 3, 7,8,9\n\n2,250,0,0\n")[0].objects == (7, 8, 9)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("5,500,2097152", "3 fields, at least 4"),
        ("5,500,2097152,2,0", "k says 2 objects, 1 follow"),
        ("5,500,2097152,1,0,1", "k says 1 objects, 2 follow"),
        ("5,-500,2097152,1,0", "'-500' is not a whole number"),
        ("5,0,2097152,1,0", "period must be more than zero"),
        ("5,500,2097152,2,4,4", "comes twice"),
        ("a,b", "'a' is not a whole number"),
        ("5,500,,1,0", "'' is not a whole number"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(line: str, said: str) -> None:
    with pytest.raises(TaskSpecError, match=said) as error:
        parse_rtswap(f"1,500,0,0\n\n{line}\n", "conf")
    assert str(error.value).startswith("conf:3: ")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"\xff")
    for name in ("c", "missing"):
        with pytest.raises(TaskSpecError):
            load_rtswap(tmp_path / name)
    with pytest.raises(ValueError, match="variant"):
        parse_rtswap("", variant="other")
