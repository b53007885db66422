"""The budget of a command."""

from __future__ import annotations

from rich.markup import escape

from narrowboat.cli.output import error_console
from narrowboat.errors import UsageError
from narrowboat.machine.memory import memory_limits
from narrowboat.quantities import format_bytes, parse_bytes

SHARE_OF_AVAILABLE = 0.8
"""What is taken of the available memory where no budget is given; the rest is for everybody else."""


def device_budget(budget: str | None, host: str | None, device: str) -> int | dict[str | int, int | str]:
    """The budget of a command that can run on a device.

    Raises:
        QuantityError: not a byte size.
        UsageError: ``--host-budget`` without a device, or a device without ``--budget``.
    """
    if device == "cpu":
        if host is not None:
            raise UsageError("--host-budget goes with --device: on the processor there is one budget")
        return resolve_budget(budget)
    if budget is None:
        raise UsageError(f"give --budget: how many bytes of the memory of {device}")
    if budget == "auto":
        raise UsageError(f"--budget auto follows the host's memory: give bytes of the memory of {device}")
    own = parse_bytes(budget)
    kind = device.partition(":")[0] if device.startswith("emulated") else device
    return own if host is None else {kind: own, "cpu": parse_bytes(host, what="host budget")}


def resolve_budget(text: str | None) -> int:
    """The budget in bytes; without one, four fifths of what this process can still take, said on stderr.

    Raises:
        QuantityError: not a byte size.
    """
    if text is not None:
        return parse_bytes(text)
    limits = memory_limits()
    budget = int(limits.available * SHARE_OF_AVAILABLE)
    error_console().print(
        f"budget: {format_bytes(budget)}, {SHARE_OF_AVAILABLE:.0%} of what is left under {escape(limits.limiter)}",
        soft_wrap=True,
        highlight=False,
    )
    return budget
