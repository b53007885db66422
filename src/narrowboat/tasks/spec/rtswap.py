"""RT-Swap's configuration lines, both variants, read strictly.

The PyTorch variant: ``modeltype,period,max_swap_volume,k,idx1,...,idxk``; the Darknet variant, whose volume is given
elsewhere: ``modeltype,period,k,idx1,...,idxk``. Periods in milliseconds, volumes in bytes, objects by the order of
their allocation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from narrowboat.errors import TaskSpecError


@dataclass(frozen=True)
class RtSwapLine:
    """One line.

    Attributes:
        model_type: number of the network.
        period_ms: of its task, which is its deadline too.
        max_swap_volume: bytes that may leave memory; None in the Darknet variant.
        objects: indices of the allocations that may be swapped.
    """

    model_type: int
    period_ms: int
    max_swap_volume: int | None
    objects: tuple[int, ...]


def parse_rtswap(text: str, where: str = "config", *, variant: str = "pytorch") -> list[RtSwapLine]:
    """All lines; empty ones are skipped.

    Raises:
        TaskSpecError: a line is not of the variant's form; the message has its number.
        ValueError: no such variant.
    """
    heads = {"pytorch": 4, "darknet": 3}
    if variant not in heads:
        raise ValueError(f"variant must be pytorch or darknet, not {variant!r}")
    head = heads[variant]
    form = "modeltype,period,max_swap_volume,k,idx..." if head == 4 else "modeltype,period,k,idx..."
    lines: list[RtSwapLine] = []
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue

        def wrong(what: str, number: int = number) -> TaskSpecError:
            return TaskSpecError(f"{where}:{number}: {what}; a line reads {form}")

        fields = [part.strip() for part in raw.split(",")]
        bad = next((part for part in fields if not part.isascii() or not part.isdigit()), None)
        if bad is not None:
            raise wrong(f"{bad!r} is not a whole number")
        values = [int(part) for part in fields]
        if len(values) < head:
            raise wrong(f"{len(values)} fields, at least {head} are needed")
        count, objects = values[head - 1], values[head:]
        if len(objects) != count:
            raise wrong(f"k says {count} objects, {len(objects)} follow")
        if len(set(objects)) != len(objects):
            raise wrong("an object comes twice")
        if values[1] == 0:
            raise wrong("the period must be more than zero")
        lines.append(RtSwapLine(values[0], values[1], values[2] if head == 4 else None, tuple(objects)))
    return lines


def load_rtswap(path: str | Path, *, variant: str = "pytorch") -> list[RtSwapLine]:
    """The same from a file.

    Raises:
        TaskSpecError: it cannot be read, or a line is wrong.
    """
    try:
        text = Path(path).read_text(encoding="ascii")
    except OSError as error:
        raise TaskSpecError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskSpecError(f"{path} is not plain text: {error}") from error
    return parse_rtswap(text, str(path), variant=variant)
