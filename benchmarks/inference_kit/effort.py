"""How much is measured: enough for a median where passes are short, no more than there is time for elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of one model is measured.

    Attributes:
        rounds: times that plain PyTorch and packed narrowboat run at each budget.
        other_rounds: of these, how many include the other subjects.
        passes: passes after the first answer.
        seconds: no pass is begun so long after the first answer.
        other_seconds: the same for the peers; the slow ones still complete one pass.
        timeout: a peer is killed after so many seconds; what it has shown until then is kept.
    """

    rounds: int
    other_rounds: int
    passes: int
    seconds: float
    other_seconds: float
    timeout: float


EFFORTS: dict[str, Effort] = {
    "resnet101": Effort(3, 1, 12, 2.0, 1.0, 8.0),
    "vgg19": Effort(2, 1, 9, 3.0, 1.5, 10.0),
    "yolov3": Effort(2, 1, 9, 3.0, 1.5, 10.0),
    "fcn": Effort(2, 1, 9, 3.0, 1.5, 10.0),
    "vit_large": Effort(2, 1, 7, 6.0, 2.0, 14.0),
    "llama_1b": Effort(1, 1, 5, 12.0, 2.0, 30.0),
}
_QUICK = Effort(1, 1, 6, 4.0, 2.0, 15.0)


def effort(name: str, *, quick: bool, rounds: int | None, passes: int | None) -> Effort:
    """The effort for a model, with what the command line says instead."""
    chosen = replace(_QUICK, timeout=EFFORTS[name].timeout) if quick else EFFORTS[name]
    if rounds is not None:
        chosen = replace(chosen, rounds=rounds, other_rounds=rounds)
    if passes is not None:
        # Whoever names a number of passes wants that number, from everybody who can make it in time.
        chosen = replace(chosen, passes=passes, seconds=60.0, other_seconds=60.0, timeout=60.0)
    return chosen
