"""One published claim, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass

from papers_kit.verdicts import Rule


@dataclass(frozen=True)
class Claim:
    """A row of the table.

    Attributes:
        id: its name on the command line, ``system.what``.
        text: the claim in our own words.
        sources: keys of ``sources.SOURCES``.
        rows: of the project's list of capabilities that it covers.
        check: the name of the check it rests on.
        rule: from what the check told to a verdict.
        note: what the measurement here leaves open: what only a GPU or the papers' own inputs could tell.
    """

    id: str
    text: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    check: str
    rule: Rule
    note: str = ""

    @property
    def system(self) -> str:
        """Whose claim it is."""
        return self.id.partition(".")[0]

    @property
    def command(self) -> str:
        """What reproduces this row alone."""
        return f"python benchmarks/papers.py --only {self.id}"
