"""A report: records to one HTML file, and its pictures as PNG beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowboat.errors import StorageError, UsageError
from narrowboat.machine.cache import write_durably
from narrowboat.report.draw.theme import NARROW, WIDE
from narrowboat.report.page.render import Part, Shown, render_page, require_jinja
from narrowboat.report.page.vector import vector_uri
from narrowboat.report.picture import require_matplotlib, save_png
from narrowboat.report.records.find import Loaded
from narrowboat.report.sections.benchmark import benchmark_section
from narrowboat.report.sections.model import (
    bench_section,
    generate_section,
    plan_section,
    run_section,
    trace_section,
)
from narrowboat.report.sections.profile import profile_section
from narrowboat.report.sections.section import Section
from narrowboat.report.sections.tasks import record_section, summary_section, verdict_section
from narrowboat.report.sections.training import train_plan_section, train_section

PAGE = "report.html"
_SECTIONS: Mapping[str, Callable[[Loaded], Section]] = {
    "run": run_section,
    "trace": trace_section,
    "plan": plan_section,
    "profile": profile_section,
    "bench": bench_section,
    "generate": generate_section,
    "train": train_section,
    "plan --train": train_plan_section,
    "tasks": record_section,
    "tasks check": verdict_section,
    "tasks summary": summary_section,
    "benchmark": benchmark_section,
}


@dataclass(frozen=True, slots=True)
class Report:
    """A report that was written.

    Attributes:
        page: the HTML file.
        pictures: the PNGs.
        sections: what it says of each record.
    """

    page: Path
    pictures: tuple[Path, ...]
    sections: tuple[Section, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "page": self.page,
            "pictures": self.pictures,
            "runs": [
                {"file": s.file, "kind": s.kind, "title": s.title, "findings": s.findings, "facts": s.facts}
                for s in self.sections
            ],
        }


def make_section(loaded: Loaded) -> Section:
    """What a report says of a record."""
    return _SECTIONS[loaded.kind](loaded)


def write_report(
    records: Sequence[Loaded],
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write ``report.html`` and the PNGs; the page comes last, so that one that is there is whole.

    Args:
        records: what to report on, in order.
        folder: where; made if it is not there.
        progress: called with (pictures done, pictures in all).

    Raises:
        UsageError: nothing to report, ``folder`` cannot be one, or matplotlib or Jinja2 is not installed.
        StorageError: a file cannot be written.
    """
    require_matplotlib()
    require_jinja()
    if not records:
        raise UsageError("there is nothing to report")
    sections = [make_section(loaded) for loaded in records]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror or error}") from error
    total, pictures, parts = sum(len(section.pictures) for section in sections), [], []
    for place, section in enumerate(sections, start=1):
        shown = []
        for picture in section.pictures:
            name = f"{place}-{section.kind.replace(' --', '-').replace(' ', '-')}-{picture.name}"
            wide = picture.draw(WIDE)
            save_png(wide, folder / f"{name}.png")
            pictures.append(folder / f"{name}.png")
            addresses = vector_uri(wide, f"{name}-wide"), vector_uri(picture.draw(NARROW), f"{name}-narrow")
            shown.append(Shown(picture.title, picture.alt, picture.caption, *addresses))
            progress(len(pictures), total)
        parts.append(
            Part(
                section.title,
                f"narrowboat {section.kind}" if section.kind != "benchmark" else "benchmark",
                section.file,
                section.findings,
                shown,
                section.tables,
                section.facts,
            )
        )
    title = sections[0].title if len(sections) == 1 else f"Report of {len(sections)} runs"
    page = folder / PAGE
    try:
        write_durably(page, render_page(title, parts))
    except OSError as error:
        raise StorageError(f"writing {page}: {error.strerror or error}") from error
    return Report(page, tuple(pictures), tuple(sections))
