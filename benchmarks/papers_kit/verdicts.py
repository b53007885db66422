"""What a measurement says about a claim: pure functions from what a check told to a verdict, never typed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Measured = Mapping[str, Any]

TOLERANCE = 0.10  # of a claimed number: within it the measurement agrees


class Kind(StrEnum):
    """How a claim and what was measured here compare."""

    AGREES = "agrees"
    BETTER = "better"
    WORSE = "worse"
    CANNOT = "cannot be measured here"
    FAILED = "check failed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Verdict:
    """One row's outcome.

    Attributes:
        kind: see ``Kind``.
        here: what was measured, in words.
        why: what makes it so, where that is not plain; of a failed check, its reason.
    """

    kind: Kind
    here: str
    why: str = ""


Rule = Callable[[Measured], Verdict]


class _MissingError(Exception):
    """A key that the rule needs was not measured."""


def judged(rule: Rule, measured: Measured | None, error: str = "", allowed: bool = True) -> Verdict:
    """The verdict on a check's outcome, whatever came of it.

    Args:
        rule: of the claim.
        measured: what the check told; None if it told nothing.
        error: why it told nothing.
        allowed: the check was asked for.
    """
    if not allowed:
        return Verdict(Kind.NOT_RUN, "-")
    if measured is None:
        return Verdict(Kind.FAILED, "-", error or "the check told nothing")
    try:
        return rule(measured)
    except _MissingError as missing:
        return Verdict(Kind.FAILED, "-", f"{missing} was not measured")


def _get(measured: Measured, key: str) -> Any:
    value = measured.get(key)
    if value is None:
        raise _MissingError(key)
    return value


def said(template: str, measured: Measured) -> str:
    """The template with what was measured put in."""

    class Filled(dict[str, Any]):
        def __missing__(self, key: str) -> Any:
            raise _MissingError(key)

    return template.format_map(Filled({k: v for k, v in measured.items() if v is not None}))


def holds(*keys: str, tell: str) -> Rule:
    """A property that has to hold in this code: every key is true, or the check has failed."""

    def rule(measured: Measured) -> Verdict:
        broken = [key for key in keys if not _get(measured, key)]
        here = said(tell, measured)
        if broken:
            return Verdict(Kind.FAILED, here, "does not hold: " + ", ".join(broken).replace("_", " "))
        return Verdict(Kind.AGREES, here)

    return rule


def supported(key: str, *, tell: str, otherwise: str) -> Rule:
    """Something that the paper's system can: agrees if this code was seen to do it, worse if it was seen not to."""

    def rule(measured: Measured) -> Verdict:
        here = said(tell, measured)
        return Verdict(Kind.AGREES, here) if _get(measured, key) else Verdict(Kind.WORSE, here, otherwise)

    return rule


def at_most(key: str, claimed: float, *, tell: str, tolerance: float = TOLERANCE) -> Rule:
    """A number that should be small: better or worse if it is off the claimed one by more than the tolerance."""

    def rule(measured: Measured) -> Verdict:
        return _compared(float(_get(measured, key)), claimed, tolerance, said(tell, measured), small=True)

    return rule


def at_least(key: str, claimed: float, *, tell: str, tolerance: float = TOLERANCE) -> Rule:
    """A number that should be large."""

    def rule(measured: Measured) -> Verdict:
        return _compared(float(_get(measured, key)), claimed, tolerance, said(tell, measured), small=False)

    return rule


def _compared(value: float, claimed: float, tolerance: float, here: str, *, small: bool) -> Verdict:
    low, high = claimed * (1 - tolerance), claimed * (1 + tolerance)
    if value != value:
        return Verdict(Kind.FAILED, here, "what was measured is no number")
    if low <= value <= high:
        return Verdict(Kind.AGREES, here, f"within {tolerance:.0%} of {claimed:g}")
    better = value < low if small else value > high
    word = "below" if value < low else "above"
    return Verdict(Kind.BETTER if better else Kind.WORSE, here, f"{value:.3g}, {word} {claimed:g}")


def also(*keys: str, rule: Rule) -> Rule:
    """Properties that have to hold besides: if one does not, the check has failed, whatever the number says."""

    def both(measured: Measured) -> Verdict:
        found = rule(measured)
        broken = [key for key in keys if not _get(measured, key)]
        if broken:
            reason = "does not hold: " + ", ".join(broken).replace("_", " ")
            return Verdict(Kind.FAILED, found.here, reason)
        return found

    return both


def cannot_without(key: str, why: str, rule: Rule | None = None) -> Rule:
    """Not to be measured where the machine lacks something; ``rule`` where it has it."""

    def found(measured: Measured) -> Verdict:
        if key not in measured:
            raise _MissingError(key)
        if not measured[key]:
            return Verdict(Kind.CANNOT, "-", why)
        if rule is None:
            return Verdict(Kind.CANNOT, "-", f"this benchmark does not measure it, though the machine could: {why}")
        return rule(measured)

    return found
