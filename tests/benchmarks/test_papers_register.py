"""The register of claims: complete, each with a public source, a check and a command; nothing else is attributed."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from papers_kit.checks import CHECKS
from papers_kit.claims import CLAIMS, ROWS, SYSTEMS, UNCLAIMED, chosen
from papers_kit.report import BEGIN, END
from papers_kit.sources import SOURCES

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_every_claim_has_a_public_source_of_its_system_and_a_check() -> None:
    for claim in CLAIMS:
        assert claim.system in SYSTEMS and claim.text.endswith((".", ")."))
        assert claim.sources and claim.check in CHECKS, claim.id
        for key in claim.sources:
            assert key.startswith(claim.system), f"{claim.id} cites {key}"
            assert re.match(r"https://[^ ]+$", SOURCES[key].url) and SOURCES[key].title and SOURCES[key].venue


def test_what_others_say_about_a_paper_is_told_as_second_hand() -> None:
    second_hand = {key for key, source in SOURCES.items() if not source.first_hand}
    assert second_hand == {"swapnet-review", "swapnet-summary", "sage-notes"}
    assert all(
        "abstract" in SOURCES[key].label or "code" in SOURCES[key].label for key in SOURCES.keys() - second_hand
    )


def test_names_are_unique_and_every_check_is_of_use() -> None:
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    assert {claim.check for claim in CLAIMS} == set(CHECKS)
    assert all(claim.command == f"python benchmarks/papers.py --only {claim.id}" for claim in CLAIMS)


def test_every_capability_is_covered_or_says_why_not() -> None:
    covered = {row for claim in CLAIMS for row in claim.rows}
    assert covered <= set(ROWS) and not covered & UNCLAIMED.keys()
    assert covered | UNCLAIMED.keys() == set(ROWS)


def test_claims_are_found_by_name() -> None:
    assert chosen([]) == list(CLAIMS)
    assert [claim.id for claim in chosen(["sage.oom", "swapnet.llm"])] == ["sage.oom", "swapnet.llm"]
    with pytest.raises(KeyError, match=r"sage\.nothing"):
        chosen(["sage.nothing"])


def test_rules_fill_their_words_from_what_is_measured_and_from_nothing_else() -> None:
    """No template may hold a figure of ours: every number in it comes out of the check."""
    for name in ("swapnet_claims", "rtswap_claims", "sage_claims"):
        source = (DOCS.parent / "benchmarks" / "papers_kit" / f"{name}.py").read_text()
        for told in re.findall(r'tell="([^"]*)"', source):
            fixed = "".join(text for text, *_ in string.Formatter().parse(told))
            assert not re.search(r"\d+(\.\d+)? ?(ms|s|MiB|GB/s|x plain)\b", fixed), told


def test_the_page_has_a_place_for_every_table() -> None:
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    for system in SYSTEMS:
        assert text.count(BEGIN.format(system=system)) == text.count(END.format(system=system)) == 1
    assert all(SOURCES[key].url in text for key in ("swapnet", "rtswap", "sage", "rtswap-code", "sage-code"))
