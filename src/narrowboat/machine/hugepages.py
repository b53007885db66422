"""Whether memory can be had in huge pages.

Source: the kernel's transparent hugepage document.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from narrowboat.machine.cgroup_tree import ROOT, read_int, read_text

_FOLDER = "sys/kernel/mm/transparent_hugepage"


@dataclass(frozen=True, slots=True)
class HugePages:
    """Transparent huge pages.

    Attributes:
        mode: ``"always"``, ``"madvise"``, ``"never"``, or ``"absent"`` where the kernel has none.
        size: bytes of one; 0 if absent.
    """

    mode: str
    size: int

    @property
    def on_advice(self) -> bool:
        """Whether memory that asks for huge pages (``madvise``) gets them."""
        return self.mode in {"always", "madvise"}


def huge_pages(root: Path = ROOT) -> HugePages:
    """The kernel's mode and page size."""
    text = read_text(root / _FOLDER / "enabled")
    if text is None:
        return HugePages("absent", 0)
    chosen = next((word.strip("[]") for word in text.split() if word.startswith("[")), "never")
    return HugePages(chosen, read_int(root / _FOLDER / "hpage_pmd_size") or 0)
