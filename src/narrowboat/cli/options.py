"""The arguments that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="package.module:factory, narrowboat.zoo:vgg19 say, or a model folder.")
]
WeightsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Weights file or folder; the model's own if it brings some.")
]
BudgetOption = Annotated[
    str | None, typer.Option(metavar="BYTES", help="Such as 300MiB. Without it: 80 % of the available memory.")
]
DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; or emulated:6GiB:12GB, to try it without a GPU.")
]
HostBudgetOption = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="With a device: pinned host memory; half of what is free without it."),
]
InputOption = Annotated[Path | None, typer.Option(metavar="FILE", help="An image, or a .npy array.")]


class Optimizer(StrEnum):
    """What changes the weights."""

    ADAMW = "adamw"
    SGD = "sgd"


class BatchNorm(StrEnum):
    """What is done about BatchNorm when a batch is split."""

    AUTO = "auto"
    NEVER = "never"
    LOCKSTEP = "lockstep"
    GHOST = "ghost"
    FROZEN = "frozen"


SpillOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Storage for activations that memory does not hold.")
]
BatchNormOption = Annotated[
    BatchNorm,
    typer.Option(help="auto, never: not split. lockstep: split and exact. ghost: per micro-batch. frozen: eval mode."),
]
TechniquesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Only these of recompute, reduce, compact, spill, accumulate, state, fuse, low_memory, with commas.",
    ),
]
OptimizerOption = Annotated[Optimizer, typer.Option(help="AdamW, or SGD with momentum 0.9.")]
LengthOption = Annotated[int | None, typer.Option(min=1, help="Tokens of a text that the model sees at once.")]
SizeOption = Annotated[int | None, typer.Option(min=1, help="Height and width of images; else the model's own.")]
StartOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Weights to begin with; random ones without it, or the model folder's."),
]


def technique_names(text: str | None) -> tuple[str, ...] | None:
    """``"a,b"`` as names; None for None."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
