"""One record in a report, before it is a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from narrowboat.quantities import format_apart, format_bytes, format_seconds
from narrowboat.report.records.find import Loaded
from narrowboat.report.records.model import About

GOOD, NOTE, BAD = "good", "note", "bad"
_CLOSE = 0.10  # share by which a prediction may be off and be called close


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to notice.

    Attributes:
        tone: ``GOOD``, ``NOTE`` or ``BAD``.
        text: a sentence.
    """

    tone: str
    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture.

    Attributes:
        name: for its file, within the section.
        title: above it.
        alt: what it shows, for those who do not see it.
        caption: what to look at.
        draw: makes matplotlib's Figure for a width in inches.
    """

    name: str
    title: str
    alt: str
    caption: str
    draw: Callable[[float], Any]


@dataclass(frozen=True, slots=True)
class Table:
    """One table; cells are text.

    Attributes:
        caption: what it is.
        columns: its header.
        rows: as many cells as columns.
        left: columns that are words; the others are numbers.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})


@dataclass(slots=True)
class Section:
    """One record.

    Attributes:
        title: its heading.
        kind: which command.
        file: where it was read from.
        findings: what to notice, in order.
        pictures, tables: in order.
        facts: names and values.
    """

    title: str
    kind: str
    file: str
    findings: list[Finding] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def notice(self, tone: str, text: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(tone, text))

    def picture(self, name: str, title: str, alt: str, caption: str, draw: Callable[[float], Any]) -> None:
        """Add a picture."""
        self.pictures.append(Picture(name, title, alt, caption, draw))


def begin(loaded: Loaded, title: str) -> Section:
    """A section with the facts that every record has."""
    return Section(title, loaded.kind, str(loaded.path), facts=about_facts(loaded.about))


def about_facts(about: About) -> dict[str, str]:
    """What a record says of how it was made, as far as it does."""
    versions = [("narrowboat", about.narrowboat), ("PyTorch", about.torch), ("Python", about.python)]
    cores = f", {about.cores} core{'s' * (about.cores != 1)}" if about.cores else ""
    threads = f", OMP_NUM_THREADS={about.threads}" if about.threads else ""
    told = {
        "command": about.command,
        "when": about.when.replace("T", " ").replace("+00:00", " UTC"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions if version),
        "machine": f"{about.processor}{cores}{threads}".lstrip(", "),
        "kernel": about.kernel,
        "memory available": format_bytes(about.memory_bytes) if about.memory_bytes else "",
    }
    return {name: value for name, value in told.items() if value}


def budget_finding(section: Section, peak: int, budget: int, what: str = "the budget") -> None:
    """Whether it held."""
    if not peak:
        return
    told_peak, told_budget = format_apart(peak, budget)
    if peak <= budget:
        section.notice(GOOD, f"{what[0].upper()}{what[1:]} held: {told_peak} of {told_budget} at the highest.")
    else:
        over = format_bytes(peak - budget)
        section.notice(BAD, f"{what[0].upper()}{what[1:]} was passed by {over}: {told_peak} of {told_budget}.")


def prediction_finding(section: Section, predicted: float, measured: float, what: str) -> None:
    """How far a prediction in seconds was off."""
    if not predicted or not measured:
        return
    off = predicted / measured - 1
    side = "too long" if off > 0 else "too short"
    how = f"{abs(off):.0%} {side}" if abs(off) >= 0.005 else "exact to half a percent"
    text = f"Prediction {how}: {format_seconds(predicted)} per {what} predicted, {format_seconds(measured)} measured."
    section.notice(GOOD if abs(off) <= _CLOSE else NOTE, text)


def seconds(milliseconds: float | None) -> str:
    """Milliseconds with a fitting unit; nothing for None."""
    return "" if milliseconds is None else format_seconds(milliseconds / 1e3)


def size(nbytes: float | None) -> str:
    """Bytes with a fitting unit; nothing for None."""
    return "" if nbytes is None else format_bytes(nbytes)
