"""Joules, where the machine counts them for its users."""

from __future__ import annotations

from pathlib import Path

_ZONES = Path("/sys/class/powercap")


def energy_joules(zones: Path = _ZONES) -> float | None:
    """Of all packages since some moment; None where nothing counts, or only for the superuser's eyes.

    Source: the kernel's Documentation/power/powercap: ``energy_uj`` of each zone ``NAME:N`` is in microjoules.
    """
    total = 0.0
    found = False
    for counter in sorted(zones.glob("*:?/energy_uj")):
        try:
            total += int(counter.read_text()) / 1e6
        except (OSError, ValueError):
            continue
        found = True
    return total if found else None
