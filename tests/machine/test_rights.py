"""Huge pages, memory locking and real-time priority."""

from pathlib import Path

import pytest

from narrowboat.machine.hugepages import huge_pages
from narrowboat.machine.realtime import has_capability, memory_locking, realtime_priority


@pytest.mark.parametrize(
    ("text", "mode", "on_advice"),
    [
        ("always [madvise] never", "madvise", True),
        ("[always] madvise never", "always", True),
        ("always madvise [never]", "never", False),
    ],
)
def test_the_huge_page_mode_is_read(tmp_path: Path, text: str, mode: str, on_advice: bool) -> None:
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    (folder / "enabled").write_text(text + "\n")
    (folder / "hpage_pmd_size").write_text("2097152\n")
    pages = huge_pages(tmp_path)
    assert (pages.mode, pages.size, pages.on_advice) == (mode, 2 << 20, on_advice)


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    assert huge_pages(tmp_path).mode == "absent"


def test_capabilities_are_read_bit_by_bit(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tx\nCapEff:\t0000000000004000\n")
    assert has_capability(14, tmp_path)
    assert not has_capability(23, tmp_path)
    assert not has_capability(14, tmp_path / "nowhere")


def test_what_is_tried_agrees_with_what_is_told() -> None:
    locking, realtime = memory_locking(), realtime_priority()
    assert locking.limit is None or locking.limit >= 0
    assert realtime.works == (realtime.reason == "")
    assert 0 <= realtime.runtime_share <= 1
